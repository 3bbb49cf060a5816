// Selections of their own: rows of any length, several rows, and what a product's blocks do not make
// themselves.
#include "backend/cuda/cluster.cuh"
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"

namespace larosa::cuda {
namespace {

/// Entries of a block's part of a row, whole vectors; the last block's may be less.
__host__ __device__ inline int part_of(int cols, int blocks) {
  return ((cols + 3) / 4 + blocks - 1) / blocks * 4;
}

template <class Row, class Write>
__device__ void select_part(const Input& in, const Row& row, const Write& write, int32_t* kept) {
  const Cut cut = cut_of(row, in, 0, 0);
  const int count = count_kept(row, in, cut);
  // No block ends while another one reads its memory.
  if constexpr (Row::Blocks::kBlocks > 1) arrive_at_cluster();
  write(cut);
  if (threadIdx.x == 0) *kept = count;
  if constexpr (Row::Blocks::kBlocks > 1) wait_for_cluster();
}

/// A row's blocks are neighbours. A block's memory has what the search takes and, behind it, score weights of
/// a part that registers hold.
template <class Blocks>
__global__ void __launch_bounds__(kRowThreads)
    select_kernel(const __grid_constant__ Input in, int64_t stride, bool held, float* masked, int32_t* kept) {
  constexpr int kBlocks = Blocks::kBlocks, kFactors = kBinBytes;
  const auto number = static_cast<int>(blockIdx.x) / kBlocks, block = static_cast<int>(blockIdx.x) % kBlocks;
  const int part = part_of(in.cols, kBlocks), first = block * part, cols = min(part, in.cols - first);
  const float* const x = in.x + number * stride + first;
  const float* const scale = in.scale ? in.scale + first : nullptr;
  float* const to = masked + number * static_cast<int64_t>(in.cols) + first;
  if (held && scale) fetch_factors(scale, cols, vectors_for(part), floats_at(kFactors));
  clear_bins(0);
  if (held) {
    with_vectors(part, [&](auto n) {
      Vectors<n.value> row{own_places<n.value>(), {}};
      wait_for_inputs();
      row.load(x, cols);
      __syncthreads();
      wait_for_fetched();
      HeldKeys<n.value, Blocks> keys{row.at, {}};  // beyond the part one that no entry has
#pragma unroll
      for (int v = 0; v < n.value; ++v) {
        float score[4] = {row.x[v][0], row.x[v][1], row.x[v][2], row.x[v][3]};
        if (scale) multiply_by(kFactors, row.at.vector(v), score);
#pragma unroll
        for (int i = 0; i < 4; ++i) keys.key[v][i] = row.at.entry(v, i) < cols ? score_key(score[i]) : -1;
      }
      const auto write = [&](const Cut& cut) {
#pragma unroll
        for (int v = 0; v < n.value; ++v) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            row.x[v][i] = cut.keeps(row.at.entry(v, i), keys.key[v][i]) ? row.x[v][i] : 0;
        }
        row.store(to, cols);
      };
      select_part(in, keys, write, kept + number);
    });
  } else {
    wait_for_inputs();
    __syncthreads();
    const MemoryRow<Blocks> row{x, scale, cols};
    const auto write = [&](const Cut& cut) {
      row.each([&](int e, int key) { to[e] = cut.keeps(e, key) ? x[e] : 0; });
    };
    select_part(in, row, write, kept + number);
  }
}

__global__ void __launch_bounds__(kRowThreads)
    list_kernel(const float* x, int cols, int32_t* count, int32_t* index) {
  wait_for_inputs();
  const int listed = list_stored(x, cols, Own(), [&](int place, int e, float) { index[place] = e; });
  if (threadIdx.x == 0) *count = listed;
}

template <class Blocks>
void launch_select(const Stream& s, Mat x, const Input& in, float* masked, int32_t* kept) {
  constexpr int kBlocks = Blocks::kBlocks;
  const int part = part_of(in.cols, kBlocks);
  const int64_t most = kBinBytes + (in.scale ? factors_bytes(part) : 0);
  const bool held = part <= kMostHeld && most <= s.shared_bytes;
  launch_clusters(s, select_kernel<Blocks>, kBlocks, static_cast<unsigned>(x.rows * kBlocks), kRowThreads,
                  held ? most : kBinBytes, in, x.stride, held, masked, kept);
}

}  // namespace

void select(const Stream& s, Mat x, const Input& rule, float* masked, int32_t* kept) {
  Input in = rule;
  in.x = x.data;
  in.cols = static_cast<int>(x.cols);
  // 8192 entries take one block 3.9 us and four 4.8, 11008 4.8 both, 14336 5.9 and 4.9, 28672 22 and 6.3
  // (eight 6.0 and 6.2). Rows that leave no multiprocessor for every block have one each.
  if (x.cols > 8192 && s.dependent && x.rows * Cluster::kBlocks <= s.multiprocessors) {
    launch_select<Cluster>(s, x, in, masked, kept);
  } else {
    launch_select<Alone>(s, x, in, masked, kept);
  }
}

void list_entries(const Stream& s, const float* row, int64_t cols, int32_t* count, int32_t* index) {
  launch_kernel(s, list_kernel, 1, kRowThreads, 0, row, static_cast<int>(cols), count, index);
}

}  // namespace larosa::cuda
