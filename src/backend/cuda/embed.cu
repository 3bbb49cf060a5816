// Rows of the embedding table.
#include "backend/cuda/launch.h"
#include "backend/cuda/stored.cuh"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 256;

template <class Line>
__global__ void __launch_bounds__(kThreads) embed_kernel(const char* table, int64_t bytes, int64_t padded,
                                                         const int32_t* tokens, int32_t only, Mat x) {
  wait_for_inputs();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, t = blockIdx.y;
  if (i >= x.cols) return;
  const int64_t token = tokens ? tokens[t] : only;
  x.data[t * x.stride + i] = Line::read(table + token * bytes, i, padded);
}

}  // namespace

void embed(const Stream& s, const Weight& table, const int32_t* tokens, int32_t only, Mat x) {
  const dim3 blocks(static_cast<unsigned>((x.cols + kThreads - 1) / kThreads), static_cast<unsigned>(x.rows));
  with_lines(table.dtype, [&]<class Line>(Line) {
    launch_kernel(s, embed_kernel<Line>, blocks, kThreads, 0, static_cast<const char*>(table.data),
                  table.line_bytes(), padded_line(table.in), tokens, only, x);
  });
}

}  // namespace larosa::cuda
