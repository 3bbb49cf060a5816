// Operands of matrix products: weights widened or rounded to what the library multiplies, activations
// rounded or widened.
#include <algorithm>

#include "backend/cuda/launch.h"
#include "backend/cuda/stored.cuh"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostLines = 65535;

/// Lines of stored values, of which [first, first + width) are wanted.
struct Lines {
  const char* data;
  int64_t bytes, padded, count, first, width;
};

/// to (count, pitch) = the lines' values; what pitch leaves over is zero.
template <class Line, class To>
__global__ void __launch_bounds__(kThreads) widen_kernel(Lines from, int64_t pitch, To* to) {
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pitch) return;
  for (int64_t line = blockIdx.y; line < from.count; line += gridDim.y) {
    const float v =
        i < from.width ? Line::read(from.data + line * from.bytes, from.first + i, from.padded) : 0.0f;
    narrow(v, to[line * pitch + i]);
  }
}

template <class Line, class To>
void convert(const Stream& s, const Lines& from, int64_t pitch, To* to) {
  const dim3 blocks(static_cast<unsigned>((pitch + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(from.count, kMostLines)));
  launch_kernel(s, widen_kernel<Line, To>, blocks, kThreads, 0, from, pitch, to);
}

__global__ void __launch_bounds__(kThreads) start_kernel(const float* bias, bool accumulate, Mat y) {
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= y.cols) return;
  float& to = y.data[blockIdx.y * y.stride + i];
  to = accumulate ? __fadd_rn(to, bias[i]) : bias[i];
}

}  // namespace

void widen_weight(const Stream& s, const Weight& w, int64_t first, int64_t count, bool bf16, int64_t pitch,
                  void* to) {
  const bool rows = w.layout == Layout::rows;
  const Lines from{static_cast<const char*>(rows ? w.line(first) : w.data),
                   w.line_bytes(),
                   padded_line(w.line_length()),
                   rows ? count : w.in,
                   rows ? 0 : first,
                   rows ? w.in : count};
  with_lines(w.dtype, [&]<class Line>(Line) {
    bf16 ? convert<Line>(s, from, pitch, static_cast<__nv_bfloat16*>(to))
         : convert<Line>(s, from, pitch, static_cast<float*>(to));
  });
}

void round_rows(const Stream& s, Mat x, int64_t pitch, void* to) {
  const Lines from{reinterpret_cast<const char*>(x.data), x.stride * 4, 0, x.rows, 0, x.cols};
  convert<Elements<float>>(s, from, pitch, static_cast<__nv_bfloat16*>(to));
}

void widen_rows(const Stream& s, Mat x, double* to) {
  const Lines from{reinterpret_cast<const char*>(x.data), x.stride * 4, 0, x.rows, 0, x.cols};
  convert<Elements<float>>(s, from, x.cols, to);
}

void start_rows(const Stream& s, const float* bias, bool accumulate, Mat y) {
  const dim3 blocks(static_cast<unsigned>((y.cols + kThreads - 1) / kThreads), static_cast<unsigned>(y.rows));
  launch_kernel(s, start_kernel, blocks, kThreads, 0, bias, accumulate, y);
}

}  // namespace larosa::cuda
