// Selections of their own: rows of any length, several rows, and what a product's blocks do not make
// themselves.
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 1024;

template <class Row>
__device__ void select_row(const Row& row, const Cut& cut, const Rule& rule, float* masked, int32_t* kept) {
  compact<kThreads>(
      row, cut, Own(), [&](int, int e) { masked[e] = row.value(e); }, [&](int e) { masked[e] = 0; });
  const int count = count_kept<kThreads>(row, rule, cut);
  if (threadIdx.x == 0) *kept = count;
}

/// One block per row. held: its memory holds the row and its keys.
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ Input in, int64_t stride, bool held, float* masked, int32_t* kept) {
  const float* const x = in.x + blockIdx.x * stride;
  float* const to = masked + blockIdx.x * static_cast<int64_t>(in.cols);
  float *const values = floats_at(kBinBytes), *const scale = floats_at(kBinBytes + padded_bytes(in.cols, 4));
  const Rule rule = rule_of(in, 0);
  if (held && in.scale) fetch_row<kThreads>(in.scale, in.cols, scale);
  wait_for_inputs();
  if (held) {
    fetch_row<kThreads>(x, in.cols, values);
    wait_for_row();
    const KeyedRow<kThreads> row{values, reinterpret_cast<const int*>(scale), in.cols};
    const Cut cut = keyed_cut<kThreads>({values, scale, in.scale != nullptr, in.cols}, row, rule, 0);
    select_row(row, cut, rule, to, kept + blockIdx.x);
  } else {
    const MemoryRow<kThreads> row{x, in.scale, in.cols};
    select_row(row, cut_of<kThreads>(row, rule), rule, to, kept + blockIdx.x);
  }
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
  const int64_t shared = kBinBytes + int64_t{2} * padded_bytes(in.cols, 4);
  const bool held = shared <= s.shared_bytes;
  launch_kernel(s, select_kernel, static_cast<unsigned>(x.rows), kThreads, held ? shared : kBinBytes, in,
                x.stride, held, masked, kept);
}

void list_entries(const Stream& s, const float* row, int64_t cols, int32_t* count, int32_t* index) {
  launch_kernel(s, list_kernel, 1, kThreads, 0, row, static_cast<int>(cols), count, index);
}

}  // namespace larosa::cuda
