// RMSNorm, a block per row; sums in the order of a product that normalises its own input.
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) norm_kernel(Mat x, const float* gain, float eps, Mat y) {
  __shared__ float reduced[kThreads / kWarp];
  wait_for_inputs();
  const int cols = static_cast<int>(x.cols);
  const float* from = x.data + blockIdx.x * x.stride;
  float* to = y.data + blockIdx.x * y.stride;
  const float sum = square_sum<kThreads>([&](int e) { return from[e]; }, cols, reduced);
  const float factor = norm_factor(sum, cols, eps);
  const Run<kThreads> run(cols);
  for (int i = 0; i < run.steps; ++i) {
    const int e = run.entry(i);
    if (e < cols) to[e] = norm_entry(from[e], factor, gain, e);
  }
}

}  // namespace

void rms_norm(const Stream& s, Mat x, const float* gain, float eps, Mat y) {
  launch_kernel(s, norm_kernel, static_cast<unsigned>(x.rows), kThreads, 0, x, gain, eps, y);
}

}  // namespace larosa::cuda
