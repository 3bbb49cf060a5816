// Operands of matrix products: weights widened or rounded to what the library multiplies, activations
// rounded.
#include <algorithm>

#include "backend/cuda/device.cuh"
#include "backend/cuda/launch.h"
#include "base/error.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostLines = 65535;

/// to (lines, pitch) = from (lines, width) with `stride` elements between its lines; the rest zero.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(const From* from, int64_t stride, int64_t lines, int64_t width, int64_t pitch, To* to) {
  let_next_start();
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pitch) return;
  for (int64_t line = blockIdx.y; line < lines; line += gridDim.y) {
    narrow(i < width ? widen(from[line * stride + i]) : 0.0f, to[line * pitch + i]);
  }
}

template <class From, class To>
void convert(const Stream& s, const From* from, int64_t stride, int64_t lines, int64_t width, int64_t pitch,
             To* to) {
  const dim3 blocks(static_cast<unsigned>((pitch + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(lines, kMostLines)));
  launch_kernel(s, widen_kernel<From, To>, blocks, kThreads, 0, from, stride, lines, width, pitch, to);
}

template <class From>
void convert_weight(const Stream& s, const Weight& w, int64_t first, int64_t count, bool bf16, int64_t pitch,
                    void* to) {
  const bool rows = w.layout == Layout::rows;
  const From* from = static_cast<const From*>(w.data) + (rows ? first * w.in : first);
  const int64_t stride = rows ? w.in : w.out, lines = rows ? count : w.in, width = rows ? w.in : count;
  if (bf16) return convert(s, from, stride, lines, width, pitch, static_cast<__nv_bfloat16*>(to));
  convert(s, from, stride, lines, width, pitch, static_cast<float*>(to));
}

__global__ void __launch_bounds__(kThreads) start_kernel(const float* bias, bool accumulate, Mat y) {
  let_next_start();
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= y.cols) return;
  float& to = y.data[blockIdx.y * y.stride + i];
  to = accumulate ? __fadd_rn(to, bias[i]) : bias[i];
}

}  // namespace

void widen_weight(const Stream& s, const Weight& w, int64_t first, int64_t count, bool bf16, int64_t pitch,
                  void* to) {
  if (w.dtype == DType::f32) return convert_weight<float>(s, w, first, count, bf16, pitch, to);
  if (w.dtype == DType::f16) return convert_weight<__half>(s, w, first, count, bf16, pitch, to);
  CHECK(w.dtype == DType::bf16);
  convert_weight<__nv_bfloat16>(s, w, first, count, bf16, pitch, to);
}

void round_rows(const Stream& s, Mat x, int64_t pitch, void* to) {
  convert(s, static_cast<const float*>(x.data), x.stride, x.rows, x.cols, pitch,
          static_cast<__nv_bfloat16*>(to));
}

void start_rows(const Stream& s, const float* bias, bool accumulate, Mat y) {
  const dim3 blocks(static_cast<unsigned>((y.cols + kThreads - 1) / kThreads), static_cast<unsigned>(y.rows));
  launch_kernel(s, start_kernel, blocks, kThreads, 0, bias, accumulate, y);
}

}  // namespace larosa::cuda
