// Selection inside one block: which entries of a row count, and a list of a share of them in the order of the
// index. Every product's blocks do this for themselves: a launch of its own costs as much and the launch on
// top.
//
// The cut is looked for in bins of keys: around that of the token before first, then among all keys, then
// within the bin that has it, until few enough are left to be ranked (find_cut).
#pragma once

#include "backend/cuda/kernels.h"
#include "backend/cuda/keys.cuh"

namespace larosa::cuda {

/// Entries with a key above `key` are kept, and those that have it before entry `end`.
struct Cut {
  int key = 0, end = 0;

  /// With && and || it was a branch for every entry, and 12 instructions instead of 3.
  __device__ bool keeps(int e, int other) const { return (other > key) | ((other == key) & (e < end)); }
};
__device__ inline Cut keep_all() {
  return {-1, 0};
}

/// Bins of a pass: two to the power of the row's kBinBits at most, before them one for each lane's keys that
/// are below, behind them one for those above, so that nothing is asked of a key. Thousands around the last
/// cut hold an entry each at most or a few: only if the cut's own has more are they ranked, which takes
/// another pass.
inline constexpr int kMostBins = 1 << 12, kBinBytes = (kWarp + kMostBins + kWarp) * 4;

struct SelectScratch {
  float reduced[kRowWarps];
  int count[kRowWarps], of_warp[kRowWarps];
  int guess;
  // find_cut's, cleared before each pass, with its bins:
  int found, rank, held;  // the bin that the cut is in, or -1; entries of it to be kept, and all
  int members, member[kWarp];
};

/// The block's own, in shared memory.
__device__ inline SelectScratch& select_scratch() {
  static_assert(sizeof(SelectScratch) <= kStaticShared);
  return block_object<SelectScratch>();
}

/// Sum of the warps' values before warp `end`.
__device__ inline int before_warp(const int* sums, int end) {
  return __reduce_add_sync(~0u, lane() < end ? sums[lane()] : 0);
}

/// Sum of the warp's values up to the thread's.
__device__ inline int sum_to_lane(int own) {
  int through = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(~0u, through, step);
    if (lane() >= step) through += before;
  }
  return through;
}

/// Before a barrier, and before find_cut. bins: their offset in the block's memory.
__device__ inline void clear_bins(int bins) {
  auto& s = select_scratch();
  auto* const four = reinterpret_cast<int4*>(block_memory() + bins);
#pragma unroll
  for (int i = 0; i < kBinBytes / 16; i += kRowThreads) {
    const int at = i + static_cast<int>(threadIdx.x);
    if (at < kBinBytes / 16) four[at] = {0, 0, 0, 0};
  }
  if (threadIdx.x == 0) s.found = -1, s.members = 0;
}

/// Adds those at `bins` to a thread's bins, whose order is from the top.
template <int kBins>
__device__ void add_bins(const int4* bins, int (&count)[kBins]) {
#pragma unroll
  for (int i = 0; i < kBins; i += 4) {
    const int4 four = bins[(kBins - 4 - i) / 4];
    count[i] += four.w, count[i + 1] += four.z, count[i + 2] += four.y, count[i + 3] += four.x;
  }
}

/// The blocks that look for a row's cut together, each in a part of the row: here one that has all of it.
/// More of them do the same search with these steps filled in (cluster.cuh).
struct Alone {
  static constexpr int kBlocks = 1;

  /// Until every thread of every block is here. From then on all see what they have written to their memory.
  __device__ static void sync() { __syncthreads(); }
  /// Where the first block has what this one has at p.
  template <class T>
  __device__ static T* in_first(T* p) {
    return p;
  }
  /// Entries of the row in the thread's bins, in higher ones, and above all bins, of which the block's lanes
  /// have `over` each. count: the thread's bins, which are at `bins`; own: their sum. Both become the row's
  /// where the cut is.
  template <int kBins>
  __device__ static int through(int over, int (&)[kBins], int& own, const int4*, int) {
    auto& s = select_scratch();
    int through = sum_to_lane(own);
    if (lane() == kWarp - 1) s.of_warp[warp()] = through;
    __syncthreads();
    through += __reduce_add_sync(~0u, over) + before_warp(s.of_warp, warp());
    return through;
  }
  /// The sum of every thread's number.
  __device__ static int sum(int own) { return block_reduce<kRowThreads>(own, select_scratch().count, Add()); }
  /// Of the row's first `count` entries of a kind, of which a thread has own(), those that the blocks before
  /// leave.
  template <class Own>
  __device__ static int share(int count, const Own&) {
    return count;
  }
};

/// The bin that a cut is in, of `1 << shift` keys from `base` on: entries that it holds, and how many of them
/// are kept; held 0: the cut is in no bin.
struct Bin {
  int base, held, rank;
};

/// The bin of the cut that keeps `keep` entries, of the row's bins from `low` on. One pass counts, and one
/// barrier and a sum over the bins find it. Bins are clear before; after, for the next pass, they are not.
template <class Row>
__device__ Bin bin_of_cut(const Row& row, int bins, int keep, int low, int shift) {
  constexpr int kBins = 1 << Row::kBinBits, kOwn = kBins / kRowThreads;
  auto& s = select_scratch();
  auto* const counts = reinterpret_cast<int*>(block_memory() + bins) + kWarp;
  const SharedCounters counters(counts);
  const int below = (-1 - lane()) * (1 << shift), above = kBins + lane();
  row.each([&](int, int key) { counters.add_one(min(max(key - low, below) >> shift, above)); });
  __syncthreads();
  const int over = counts[above];
  int count[kOwn] = {}, own = 0;
  const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kOwn;
  const auto* const of_thread = reinterpret_cast<const int4*>(counts + first);
  add_bins(of_thread, count);
#pragma unroll
  for (const int n : count) own += n;
  const int through = Row::Blocks::through(over, count, own, of_thread, keep);
  if (through - own < keep && keep <= through) {
    const int wanted = keep - (through - own);
    int at = 0, before = 0, held = count[0], sum = 0;
#pragma unroll
    for (int i = 1; i < kOwn; ++i) {
      sum += count[i - 1];
      if (sum < wanted) at = i, before = sum, held = count[i];
    }
    s.found = first + kOwn - 1 - at;
    s.rank = wanted - before;
    s.held = held;
  }
  __syncthreads();
  if (s.found < 0) return {0, 0, 0};
  return {low + (s.found << shift), s.held, s.rank};
}

/// The end of the first `ties` entries that have a key, which more have. Slow: exact ties are zeros or
/// chance.
template <class Row>
__device__ int end_of_ties(const Row& row, int cols, int key, int ties) {
  auto& s = select_scratch();
  ties = Row::Blocks::share(ties, [&] {
    int own = 0;
    row.each([&](int, int other) { own += other == key; });
    return own;
  });
  int low = 0, high = cols;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) / 2;
    int before = 0;
    row.each([&](int e, int other) { before += other == key && e < middle; });
    __syncthreads();  // everybody has read the sums
    before = block_reduce<kRowThreads>(before, s.count, Add());
    if (before < ties) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The cut in a bin of a warp's keys at most, by their ranks.
template <class Row>
__device__ Cut ranked_cut(const Row& row, int cols, const Bin& bin, int shift) {
  auto& s = select_scratch();
  const auto in_bin = [&](int key) { return static_cast<unsigned>(key - bin.base) < 1u << shift; };
  int own = 0;
  row.each([&](int, int key) { own += in_bin(key); });
  if (own > 0) {  // of few threads
    int place = atomicAdd(Row::Blocks::in_first(&s.members), own);
    row.each([&](int, int key) {
      if (in_bin(key)) *Row::Blocks::in_first(&s.member[place++]) = key;
    });
  }
  Row::Blocks::sync();
  const int mine = lane() < bin.held ? *Row::Blocks::in_first(&s.member[lane()]) : -1;
  int greater = 0, equal = 0;
#pragma unroll 1
  for (int i = 0; i < bin.held; ++i) {
    const int other = __shfl_sync(~0u, mine, i);
    greater += other > mine;
    equal += other == mine;
  }
  const bool last = lane() < bin.held && greater < bin.rank && bin.rank <= greater + equal;
  const int source = __ffs(static_cast<int>(__ballot_sync(~0u, last))) - 1;
  const int key = __shfl_sync(~0u, mine, source), ties = bin.rank - __shfl_sync(~0u, greater, source);
  if (ties == __shfl_sync(~0u, equal, source)) return {key - 1, 0};
  return {key, end_of_ties(row, cols, key, ties)};
}

/// The cut that keeps exactly `keep` of a row's entries, 0 < keep < cols. guess: a key near it, or 0; it
/// decides how many passes are made, not what is found. Bins are clear.
template <class Row>
__device__ Cut find_cut(const Row& row, int cols, int bins, int keep, int guess) {
  constexpr int kBits = Row::kBinBits, kAll = 31 - kBits;
  constexpr int kNear = 22 - kBits;  // a quarter of an octave to each side
  int low = 0, shift = kAll;
  if (guess > 0) low = max(guess - (1 << (kNear + kBits - 1)), 1), shift = kNear;
#pragma unroll 1
  for (;;) {
    const Bin bin = bin_of_cut(row, bins, keep, low, shift);
    if (bin.held == 0) {
      low = 0, shift = kAll;
    } else if (bin.rank == bin.held) {
      return {bin.base - 1, 0};
    } else if (bin.held <= kWarp) {
      return ranked_cut(row, cols, bin, shift);
    } else if (shift == 0) {
      return {bin.base, end_of_ties(row, cols, bin.base, bin.rank)};
    } else {
      low = bin.base, shift = max(shift - kBits, 0);
    }
    Row::Blocks::sync();  // everybody has read where the cut was
    clear_bins(bins);
    __syncthreads();
  }
}

/// What `in` selects of a row.
template <class Row>
__device__ Cut cut_of(const Row& row, const Input& in, int bins, int guess) {
  // keeps_all(in), which as a call made the compiler move values to uniform registers at 70 more places.
  if (in.select == Selects::all || (in.select == Selects::topk && in.keep == in.cols)) return keep_all();
  if (in.select == Selects::threshold) {    // keys are the bits of non-negative floats: so is the cut
    if (!(in.cut >= 0)) return keep_all();  // below zero, or a NaN
    return {in.cut == 0 ? 0 : __float_as_int(in.cut), 0};
  }
  if (in.keep == 0) return {kNanKey, 0};
  return find_cut(row, in.cols, bins, in.keep, guess);
}

/// Entries that `in` keeps of a row, zeros too; for every thread.
template <class Row>
__device__ int count_kept(const Row& row, const Input& in, const Cut& cut) {
  if (cut.key < 0) return in.cols;
  if (in.select == Selects::topk) return in.keep;
  int kept = 0;
  row.each([&](int e, int key) { kept += cut.keeps(e, key) && e < in.cols; });
  __syncthreads();
  return Row::Blocks::sum(kept);
}

/// take(place, e, x) of what is not zero in a share of a row in memory, in order; returns how many these are.
template <class Take>
__device__ int list_stored(const float* row, int cols, const Own& own, const Take& take) {
  auto& s = select_scratch();
  const int count = own.count(cols), steps = (count + kRowThreads - 1) / kRowThreads;
  // A warp has one run of the share.
  const auto each = [&](const auto& body) {
#pragma unroll 4
    for (int i = 0; i < steps; ++i) {
      const int number = (warp() * steps + i) * kWarp + lane();
      const float x = number < count ? __ldcg(row + own.entry(number)) : 0;
      body(own.entry(number), x, __ballot_sync(~0u, __float_as_uint(x) != 0));
    }
  };
  int listed = 0;
  each([&](int, float, uint32_t mask) { listed += __popc(mask); });
  if (lane() == 0) s.of_warp[warp()] = listed;
  __syncthreads();
  int place = before_warp(s.of_warp, warp());
  each([&](int e, float x, uint32_t mask) {
    if (mask >> lane() & 1) take(place + __popc(mask & ((1u << lane()) - 1)), e, x);
    place += __popc(mask);
  });
  return before_warp(s.of_warp, kRowWarps);
}

}  // namespace larosa::cuda
