// Attention of one row, compiled for the host.
#include "backend/cuda/machine.cuh"
// Behind it.
#include "backend/cuda/attend_row.cu"
