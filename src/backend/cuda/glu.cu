// SiLU(gate) · up.
#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) glu_kernel(Mat gate, Mat up, Mat mid) {
  let_next_start();
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (i >= gate.cols) return;
  mid.data[t * mid.stride + i] = __fmul_rn(silu(gate.data[t * gate.stride + i]), up.data[t * up.stride + i]);
}

}  // namespace

void glu(const Stream& s, Mat gate, Mat up, Mat mid) {
  const dim3 blocks(static_cast<unsigned>((gate.cols + kThreads - 1) / kThreads),
                    static_cast<unsigned>(gate.rows));
  launch_kernel(s, glu_kernel, blocks, kThreads, 0, gate, up, mid);
}

}  // namespace larosa::cuda
