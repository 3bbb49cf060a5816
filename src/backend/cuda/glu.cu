// Activations, a(gate) · up, and rows with zeros where a selection says so: element by element.
#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int64_t column() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ float& at(const Mat& m, int64_t i) {
  return m.data[blockIdx.y * m.stride + i];
}

__global__ void __launch_bounds__(kThreads) glu_kernel(Mat gate, Mat up, Activation activation, Mat mid) {
  wait_for_inputs();
  const int64_t i = column();
  if (i < gate.cols) at(mid, i) = gated(at(gate, i), at(up, i), activation);
}

__global__ void __launch_bounds__(kThreads) activate_kernel(Mat z, Activation activation, Mat y) {
  wait_for_inputs();
  const int64_t i = column();
  if (i < z.cols) at(y, i) = activated(at(z, i), activation);
}

__global__ void __launch_bounds__(kThreads) mask_kernel(Mat kept, bool inverted, Mat x, Mat y) {
  wait_for_inputs();
  const int64_t i = column();
  if (i < x.cols) at(y, i) = (at(kept, i) == 0) != inverted ? at(x, i) : 0.0f;
}

dim3 blocks_of(const Mat& m) {
  return {static_cast<unsigned>((m.cols + kThreads - 1) / kThreads), static_cast<unsigned>(m.rows)};
}

}  // namespace

void glu(const Stream& s, Mat gate, Mat up, const Activation& activation, Mat mid) {
  launch_kernel(s, glu_kernel, blocks_of(gate), kThreads, 0, gate, up, activation, mid);
}

void activate(const Stream& s, Mat z, const Activation& activation, Mat y) {
  launch_kernel(s, activate_kernel, blocks_of(z), kThreads, 0, z, activation, y);
}

void mask(const Stream& s, Mat kept, bool inverted, Mat x, Mat y) {
  launch_kernel(s, mask_kernel, blocks_of(x), kThreads, 0, kept, inverted, x, y);
}

}  // namespace larosa::cuda
