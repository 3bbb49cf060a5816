// The largest entries of a row, compiled for the host.
#include "backend/cuda/machine.cuh"
// Behind it.
#include "backend/cuda/largest.cu"
