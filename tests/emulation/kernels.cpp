// The decoding product, compiled for the host.
#include "backend/cuda/machine.cuh"
// Behind it.
#include "backend/cuda/gemv.cu"
