#include "backend/cuda/machine.cuh"
// Behind it.
#include "backend/cuda/topk.cu"
