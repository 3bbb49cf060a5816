// Selections of their own: rows of any length, several rows, and what a product's blocks do not make
// themselves.
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"

namespace larosa::cuda {
namespace {

template <class Row, class Write>
__device__ void select_one(const Input& in, const Row& row, const Write& write, int32_t* kept) {
  const Cut cut = cut_of(row, in, 0, 0);
  write(cut);
  const int count = count_kept(row, in, cut);
  if (threadIdx.x == 0) *kept = count;
}

/// One block per row. Its memory has bins and, behind them, score weights of a row that registers hold.
__global__ void __launch_bounds__(kRowThreads)
    select_kernel(const __grid_constant__ Input in, int64_t stride, bool held, float* masked, int32_t* kept) {
  const float* const x = in.x + blockIdx.x * stride;
  float* const to = masked + blockIdx.x * static_cast<int64_t>(in.cols);
  const bool scaled = in.scale != nullptr;
  if (held && scaled) fetch_factors(in.scale, in.cols, floats_at(kBinBytes));
  clear_bins(0);
  __syncthreads();
  wait_for_inputs();
  if (held) {
    with_vectors(in.cols, [&](auto n) {
      Vectors<n.value> row{own_places<n.value>(), {}};
      row.load(x, in.cols);
      row.clear_beyond(in.cols);
      wait_for_fetched();
      HeldKeys<n.value> keys{row.at, {}};
#pragma unroll
      for (int v = 0; v < n.value; ++v) {
        float score[4] = {row.x[v][0], row.x[v][1], row.x[v][2], row.x[v][3]};
        if (scaled) multiply_by(kBinBytes, row.at.vector(v), score);
#pragma unroll
        for (int i = 0; i < 4; ++i) keys.key[v][i] = score_key(score[i]);
      }
      const auto write = [&](const Cut& cut) {
#pragma unroll
        for (int v = 0; v < n.value; ++v) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int e = row.at.entry(v, i);
            if (e < in.cols) to[e] = cut.keeps(e, keys.key[v][i]) ? row.x[v][i] : 0;
          }
        }
      };
      select_one(in, keys, write, kept + blockIdx.x);
    });
  } else {
    const MemoryRow row{x, in.scale, in.cols};
    const auto write = [&](const Cut& cut) {
      row.each([&](int e, int key) { to[e] = cut.keeps(e, key) ? x[e] : 0; });
    };
    select_one(in, row, write, kept + blockIdx.x);
  }
}

__global__ void __launch_bounds__(kRowThreads)
    list_kernel(const float* x, int cols, int32_t* count, int32_t* index) {
  wait_for_inputs();
  const int listed = list_stored(x, cols, Own(), [&](int place, int e, float) { index[place] = e; });
  if (threadIdx.x == 0) *count = listed;
}

}  // namespace

void select(const Stream& s, Mat x, const Input& rule, float* masked, int32_t* kept) {
  Input in = rule;
  in.x = x.data;
  in.cols = static_cast<int>(x.cols);
  const int64_t most = kBinBytes + (in.scale ? factors_bytes(in.cols) : 0);
  const bool held = in.cols <= kMostHeld && most <= s.shared_bytes;
  launch_kernel(s, select_kernel, static_cast<unsigned>(x.rows), kRowThreads, held ? most : kBinBytes, in,
                x.stride, held, masked, kept);
}

void list_entries(const Stream& s, const float* row, int64_t cols, int32_t* count, int32_t* index) {
  launch_kernel(s, list_kernel, 1, kRowThreads, 0, row, static_cast<int>(cols), count, index);
}

}  // namespace larosa::cuda
