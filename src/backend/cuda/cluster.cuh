// A selection that several blocks share: a cluster, each of whose blocks has a part of the row and finds the
// cut of all of it.
#pragma once

#include "backend/cuda/select.cuh"

namespace larosa::cuda {

/// What Alone is for one block. The blocks reach into each other's shared memory, every time between two
/// barriers of the cluster: behind what its own block has written there, and before it writes there again.
struct Cluster {
  static constexpr int kBlocks = 4;

  __device__ static void sync() {
    arrive_at_cluster();
    wait_for_cluster();
  }
  template <class T>
  __device__ static T* in_first(T* p) {
    return in_block(p, 0);
  }
  /// Every warp adds up the sums of all blocks' warps, and only the one that has the cut in its bins adds up
  /// these: all bins by all threads took 1.1 us more of 14336 entries.
  template <int kBins>
  __device__ static int through(int over, int (&count)[kBins], int& own, const int4* bins, int keep) {
    static_assert(2 * kRowWarps == kWarp);
    auto& s = select_scratch();
    over = __reduce_add_sync(~0u, warp() == 0 ? over : 0);  // once, whereas every warp has it
    if (lane() == 0) s.count[warp()] = over;
    put_sum(own);
    const int sum =
        sum_before(kBlocks, lane() < kRowWarps ? s.count + lane() : s.of_warp + lane() - kRowWarps);
    const int before = __reduce_add_sync(~0u, lane() < kRowWarps + warp() ? sum : 0);
    const int through = before + __shfl_sync(~0u, sum, kRowWarps + warp());
    own = 0;
    if (keep <= before || through < keep) return through;
#pragma unroll
    for (int b = 1; b < kBlocks; ++b) add_bins(in_block(bins, (rank() + b) % kBlocks), count);
#pragma unroll
    for (const int n : count) own += n;
    return before + sum_to_lane(own);
  }
  __device__ static int sum(int own) {
    put_sum(own);
    return sum_of_blocks(kBlocks);
  }
  template <class Own>
  __device__ static int share(int count, const Own& own) {
    sync();  // everybody has read the sums
    put_sum(own());
    return max(count - sum_of_blocks(rank()), 0);
  }

 private:
  __device__ static int rank() {
    return static_cast<int>(blockIdx.x) % kBlocks;
  }
  /// The warps' sums, for all blocks.
  __device__ static void put_sum(int own) {
    own = __reduce_add_sync(~0u, own);
    if (lane() == 0) select_scratch().of_warp[warp()] = own;
    sync();
  }
  /// The sum of what the blocks before `end` have at p.
  __device__ static int sum_before(int end, const int* p) {
    int sum = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) sum += b < end ? *in_block(p, b) : 0;
    return sum;
  }
  __device__ static int sum_of_blocks(int end) {
    const int* const sums = select_scratch().of_warp;
    return __reduce_add_sync(~0u, lane() < kRowWarps ? sum_before(end, sums + lane()) : 0);
  }
};

}  // namespace larosa::cuda
