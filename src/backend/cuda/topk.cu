// Selections of their own: rows of any length, several rows, and what a product's blocks do not make
// themselves.
#include "backend/cuda/launch.h"
#include "backend/cuda/select.cuh"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 1024;

/// One block per row.
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ Input in, int64_t stride, float* masked, int32_t* kept) {
  wait_for_inputs();
  const MemoryRow<kThreads> row{in.x + blockIdx.x * stride, in.scale, in.cols};
  float* const to = masked + blockIdx.x * static_cast<int64_t>(in.cols);
  const Rule rule = rule_of(in);
  const Cut cut = cut_of<kThreads>(row, rule, 0);
  const int count = count_kept<kThreads>(row, rule, cut);
  compact<kThreads>(
      row, cut, Own(), [&](int, int e) { to[e] = row.value(e); }, [&](int e) { to[e] = 0; });
  if (threadIdx.x == 0) kept[blockIdx.x] = count;
}

__global__ void __launch_bounds__(kThreads)
    list_kernel(const float* x, int cols, int32_t* count, int32_t* index) {
  wait_for_inputs();
  const MemoryRow<kThreads> row{x, nullptr, cols};
  const int listed = compact<kThreads>(
      row, Cut{0, kAllTies}, Own(), [&](int place, int e) { index[place] = e; }, [](int) {});
  if (threadIdx.x == 0) *count = listed;
}

}  // namespace

void select(const Stream& s, Mat x, const Input& rule, float* masked, int32_t* kept) {
  Input in = rule;
  in.x = x.data;
  in.cols = static_cast<int>(x.cols);
  launch_kernel(s, select_kernel, static_cast<unsigned>(x.rows), kThreads, 0, in, x.stride, masked, kept);
}

void list_entries(const Stream& s, const float* row, int64_t cols, int32_t* count, int32_t* index) {
  launch_kernel(s, list_kernel, 1, kThreads, 0, row, static_cast<int>(cols), count, index);
}

}  // namespace larosa::cuda
