// Log-probabilities, a block per row.
#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) softmax_kernel(Mat x) {
  __shared__ float reduced[kThreads / kWarp];
  wait_for_inputs();
  float* row = x.data + blockIdx.x * x.stride;
  float top = row[0];
  for (int64_t i = threadIdx.x; i < x.cols; i += kThreads) top = Larger()(top, row[i]);
  top = block_reduce<kThreads>(top, reduced, Larger());
  float sum = 0;
  for (int64_t i = threadIdx.x; i < x.cols; i += kThreads) sum += expf(row[i] - top);
  __syncthreads();
  sum = block_reduce<kThreads>(sum, reduced, Add());
  const float total = logf(sum);
  for (int64_t i = threadIdx.x; i < x.cols; i += kThreads) row[i] = __fsub_rn(__fsub_rn(row[i], top), total);
}

}  // namespace

void log_softmax(const Stream& s, Mat x) {
  launch_kernel(s, softmax_kernel, static_cast<unsigned>(x.rows), kThreads, 0, x);
}

}  // namespace larosa::cuda
