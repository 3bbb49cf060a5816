// The decoding product by outputs, compiled for the host, where memory is set at once.
#include "backend/cuda/machine.cuh"
// Behind it.
#include <cstring>

namespace {
cudaError_t set_host_memory(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
}  // namespace

#define cudaMemsetAsync set_host_memory
#include "backend/cuda/gemv_rows.cu"
