// Rows of the embedding table, and rows of activations copied.
#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"
#include "base/error.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const T* table, const int32_t* tokens, int32_t only, Mat x) {
  let_next_start();
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (i >= x.cols) return;
  const int64_t token = tokens ? tokens[t] : only;
  x.data[t * x.stride + i] = widen(table[token * x.cols + i]);
}

}  // namespace

void embed(const Stream& s, const Weight& table, const int32_t* tokens, int32_t only, Mat x) {
  const dim3 blocks(static_cast<unsigned>((x.cols + kThreads - 1) / kThreads), static_cast<unsigned>(x.rows));
  const auto launch = [&]<class T>(const T* rows) {
    launch_kernel(s, embed_kernel<T>, blocks, kThreads, 0, rows, tokens, only, x);
  };
  if (table.dtype == DType::f32) return launch(static_cast<const float*>(table.data));
  if (table.dtype == DType::f16) return launch(static_cast<const __half*>(table.data));
  CHECK(table.dtype == DType::bf16);
  launch(static_cast<const __nv_bfloat16*>(table.data));
}

}  // namespace larosa::cuda
