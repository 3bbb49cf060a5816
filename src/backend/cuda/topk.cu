// Selections of their own: rows of any length, several rows, and what a product's blocks do not make
// themselves.
#include "backend/cuda/launch.h"
#include "backend/cuda/select.cuh"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 1024;

/// One block per row: to the list when there is one row, else to a row with zeros.
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ Input in, int64_t stride, List list, float* masked, int32_t* kept) {
  wait_for_inputs();
  const MemoryRow<kThreads> row{in.x + blockIdx.x * stride, in.scale, in.cols};
  float* to = masked ? masked + blockIdx.x * static_cast<int64_t>(in.cols) : nullptr;
  if (masked) {
    for (int i = static_cast<int>(threadIdx.x); i < in.cols; i += kThreads) to[i] = 0;
    __syncthreads();
  }
  const Cut cut = cut_of<kThreads>(row, rule_of(in), 0);
  const int2 counts = compact<kThreads>(row, cut, [&](int place, int i) {
    if (masked) {
      to[i] = row.value(i);
    } else {
      list.index[place] = i;
      list.value[place] = row.value(i);
    }
  });
  if (threadIdx.x != 0) return;
  if (masked) {
    kept[blockIdx.x] = counts.y;
  } else {
    list.counts[0] = counts.x;
    list.counts[1] = counts.y;
  }
}

__global__ void __launch_bounds__(kThreads) expand_kernel(List list, int cols, float* y) {
  wait_for_inputs();
  for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads) y[i] = 0;
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < list.counts[0]; e += kThreads)
    y[list.index[e]] = list.value[e];
}

}  // namespace

void select(const Stream& s, Mat x, const Input& rule, const List& list, float* masked, int32_t* kept) {
  Input in = rule;
  in.x = x.data;
  in.cols = static_cast<int>(x.cols);
  launch_kernel(s, select_kernel, static_cast<unsigned>(x.rows), kThreads, 0, in, x.stride, list, masked,
                kept);
}

void expand_list(const Stream& s, const List& list, int64_t cols, float* y) {
  launch_kernel(s, expand_kernel, 1, kThreads, 0, list, static_cast<int>(cols), y);
}

}  // namespace larosa::cuda
