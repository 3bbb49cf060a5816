// RMSNorm, a block per row; sums in the order of a product that normalises its own input.
#include "backend/cuda/keys.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads) norm_kernel(Mat x, const float* gain, float eps, Mat y) {
  __shared__ float reduced[kRowWarps];
  wait_for_inputs();
  const int cols = static_cast<int>(x.cols);
  const float* from = x.data + blockIdx.x * x.stride;
  float* to = y.data + blockIdx.x * y.stride;
  float sum = 0;
  if (cols <= kMostHeld) {
    with_vectors(cols, [&](auto n) {
      Vectors<n.value> row{own_places<n.value>(), {}};
      row.load(from, cols);
      row.clear_beyond(cols);
      sum = row.square_sum(reduced);
    });
  } else {
    for (int e = static_cast<int>(threadIdx.x); e < cols; e += kRowThreads) sum = fmaf(from[e], from[e], sum);
    sum = block_reduce<kRowThreads>(sum, reduced, Add());
  }
  const float factor = norm_factor(sum, cols, eps);
  for (int e = static_cast<int>(threadIdx.x); e < cols; e += kRowThreads)
    to[e] = norm_entry(from[e], factor, gain, e);
}

}  // namespace

void rms_norm(const Stream& s, Mat x, const float* gain, float eps, Mat y) {
  launch_kernel(s, norm_kernel, static_cast<unsigned>(x.rows), kRowThreads, 0, x, gain, eps, y);
}

}  // namespace larosa::cuda
