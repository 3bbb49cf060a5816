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

/// Entries with a key above `key` are kept, and the first `ties` of those that have it.
struct Cut {
  int key = 0, ties = 0;
};
inline constexpr int kAllTies = 1 << 30;

/// Bins of a pass, which finds so many bits of the cut. Four thousand around the last cut hold an entry each
/// at most (4096 entries) or a few: only if the cut's own has more are they ranked, which takes another pass.
inline constexpr int kBinBits = 12, kBins = 1 << kBinBits, kBinBytes = kBins * 4;

template <int kThreads>
struct SelectScratch {
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp);
  int warp_sum[kWarps], warp_ties[kWarps];
  float reduced[kWarps];
  int guess;
  // find_cut's, cleared before each pass, with its bins:
  int found, rank, held;  // the bin that the cut is in, or -1; entries of it to be kept, and all
  int members, member[kWarp];
};

/// The block's own, in shared memory.
template <int kThreads>
__device__ SelectScratch<kThreads>& select_scratch() {
  static_assert(sizeof(SelectScratch<kThreads>) <= kStaticShared);
  return block_object<SelectScratch<kThreads>>();
}

/// Sum of the warps' values before warp `end`.
__device__ inline int before_warp(const int* sums, int end) {
  return __reduce_add_sync(~0u, lane() < end ? sums[lane()] : 0);
}

/// Which entries are to be kept: by value, since through a pointer to the kernel's arguments a function that
/// is not inlined reads them from memory.
struct Rule {
  Selects select;
  int cols, keep;
  float cut;
  int32_t* guess;
  float* masked;
  int32_t* kept;
  int bins;  // offset of kBins in the block's memory, where a list may come later
};
__device__ inline Rule rule_of(const Input& in, int bins) {
  return {in.select, in.cols, in.keep, in.cut, in.guess, in.masked, in.kept, bins};
}

/// A thread's bins, from the top.
template <int kThreads>
__device__ int4* own_bins(int bins) {
  static_assert(kBins / kThreads % 4 == 0);
  return reinterpret_cast<int4*>(block_memory() + bins) +
         (kThreads - 1 - threadIdx.x) * (kBins / kThreads / 4);
}
/// Before a barrier, and before find_cut_near.
template <int kThreads>
__device__ void clear_bins(int bins) {
  auto& s = select_scratch<kThreads>();
#pragma unroll
  for (int i = 0; i < kBins / kThreads / 4; ++i) own_bins<kThreads>(bins)[i] = {0, 0, 0, 0};
  if (threadIdx.x == 0) s.found = -1, s.members = 0;
}

/// The bin that a cut is in, of `1 << shift` keys from `base` on: entries that it holds, and how many of them
/// are kept; held 0: the cut is in no bin.
struct Bin {
  int base, held, rank;
};

/// The bin of the cut that keeps `keep` entries, of kBins from `low` on. One pass counts, and one barrier and
/// a sum over the bins find it. Bins are clear before; after, for the next pass, they are not.
template <int kThreads, class Row>
__device__ Bin bin_of_cut(const Row& row, int bins, int keep, int low, int shift) {
  constexpr int kWarps = kThreads / kWarp;
  auto& s = select_scratch<kThreads>();
  const unsigned span = (static_cast<unsigned>(kBins) << shift) - 1;
  const int last = low + static_cast<int>(min(span, static_cast<unsigned>(kNanKey - low)));
  const SharedCounters counters(reinterpret_cast<int*>(block_memory() + bins));
  int above = 0;
  row.template in_batches<4>(Own(), [&](int, const int(&key)[4], unsigned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      counters.add_one(static_cast<unsigned>(key[i] - low) >> shift, kBins);  // a lower key has no bin
      above += key[i] > last;
    }
  });
  above = __reduce_add_sync(~0u, above);
  if (lane() == 0) s.warp_sum[warp()] = above;
  __syncthreads();
  constexpr int kOwn = kBins / kThreads;
  int count[kOwn], own = 0;  // from the top
#pragma unroll
  for (int i = 0; i < kOwn / 4; ++i) {
    const int4 four = own_bins<kThreads>(bins)[kOwn / 4 - 1 - i];
    count[4 * i] = four.w, count[4 * i + 1] = four.z, count[4 * i + 2] = four.y, count[4 * i + 3] = four.x;
  }
#pragma unroll
  for (const int n : count) own += n;
  int through = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(~0u, through, step);
    if (lane() >= step) through += before;
  }
  if (lane() == kWarp - 1) s.warp_ties[warp()] = through;
  __syncthreads();
  through += before_warp(s.warp_sum, kWarps) + before_warp(s.warp_ties, warp());
  if (through - own < keep && keep <= through) {
    int wanted = keep - (through - own);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (0 < wanted && wanted <= count[i]) {
        s.found = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn - i;
        s.rank = wanted;
        s.held = count[i];
      }
      wanted -= count[i];
    }
  }
  __syncthreads();
  if (s.found < 0) return {0, 0, 0};
  return {low + (s.found << shift), s.held, s.rank};
}

/// The cut in a bin of a warp's keys at most, by their ranks.
template <int kThreads, class Row>
__device__ Cut ranked_cut(const Row& row, const Bin& bin, int shift) {
  auto& s = select_scratch<kThreads>();
  row.template in_batches<4>(Own(), [&](int, const int(&key)[4], unsigned) {
    const auto in_bin = [&](int i) { return static_cast<unsigned>(key[i] - bin.base) < 1u << shift; };
    if (!in_bin(0) && !in_bin(1) && !in_bin(2) && !in_bin(3)) return;  // as nearly all
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (in_bin(i)) s.member[atomicAdd(&s.members, 1)] = key[i];
  });
  __syncthreads();
  const int mine = lane() < bin.held ? s.member[lane()] : kNoKey;
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
  return ties == __shfl_sync(~0u, equal, source) ? Cut{key - 1, 0} : Cut{key, ties};
}

/// The cut that keeps exactly `keep` of the row's entries, 0 < keep < cols, among kBins of `1 << shift` keys
/// from `low` on; then in the one that has it, until what is left can be ranked. Bins are cleared here. Not
/// inlined: decoding hardly ever comes here, and its own code stays together.
template <int kThreads, class Row>
__device__ __noinline__ Cut find_cut(Row row, int bins, int keep, int low, int shift) {
#pragma unroll 1
  for (;;) {
    __syncthreads();  // everybody has read where the cut was
    clear_bins<kThreads>(bins);
    __syncthreads();
    const Bin bin = bin_of_cut<kThreads>(row, bins, keep, low, shift);
    if (bin.rank == bin.held) return {bin.base - 1, 0};
    if (bin.held <= kWarp) return ranked_cut<kThreads>(row, bin, shift);
    if (shift == 0) return {bin.base, bin.rank};
    low = bin.base, shift = max(shift - kBinBits, 0);
  }
}
/// The same without a guess: among all sixteenths of octaves.
template <int kThreads, class Row>
__device__ Cut find_cut(const Row& row, int bins, int keep) {
  return find_cut<kThreads>(row, bins, keep, 0, 31 - kBinBits);
}
/// The same from a guess, a key near the cut: it decides how many passes are made, not what is found. The
/// first one is made over `first`, the same row. Bins are clear.
template <int kThreads, class Row, class First>
__device__ Cut find_cut_near(const Row& row, const First& first, int bins, int keep, int guess) {
  constexpr int kNear = 10;  // a quarter of an octave to each side
  const Bin bin = bin_of_cut<kThreads>(first, bins, keep, max(guess - (kBins << kNear) / 2, 1), kNear);
  if (bin.held == 0) return find_cut<kThreads>(row, bins, keep);
  if (bin.rank == bin.held) return {bin.base - 1, 0};
  if (bin.held <= kWarp) return ranked_cut<kThreads>(row, bin, kNear);
  return find_cut<kThreads>(row, bins, keep, bin.base, 0);
}

/// What a rule keeps of a row.
template <int kThreads, class Row>
__device__ Cut cut_of(const Row& row, const Rule& rule) {
  if (rule.select == Selects::all || (rule.select == Selects::topk && rule.keep == rule.cols))
    return {0, kAllTies};
  if (rule.select == Selects::threshold) {       // keys are the bits of non-negative floats: so is the cut
    if (!(rule.cut >= 0)) return {0, kAllTies};  // below zero, or a NaN
    return {rule.cut == 0 ? 0 : __float_as_int(rule.cut), 0};
  }
  if (rule.keep == 0) return {kNanKey, 0};
  return find_cut<kThreads>(row, rule.bins, rule.keep);
}
/// True when that has to be searched for.
__device__ inline bool searched(const Rule& rule) {
  return rule.select == Selects::topk && 0 < rule.keep && rule.keep < rule.cols;
}

/// Entries that a rule keeps of a row, zeros too; for every thread.
template <int kThreads, class Row>
__device__ int count_kept(const Row& row, const Rule& rule, const Cut& cut) {
  if (cut.ties == kAllTies) return rule.cols;
  if (rule.select == Selects::topk) return rule.keep;
  int above = 0;
  row.template each<4>([&](int, int key) { above += key > cut.key; });
  __syncthreads();
  return block_reduce<kThreads>(above, select_scratch<kThreads>().warp_sum, Add());
}

/// Hands a share's kept entries to take(place, index), in the order of the index, zeros left out, and the
/// others to leave(index); returns how many were taken. Each warp has one run of the row.
template <int kThreads, class Row, class Take, class Leave>
__device__ int compact(const Row& row, const Cut& cut, const Own& own, const Take& take, const Leave& leave) {
  constexpr int kWarps = kThreads / kWarp;
  auto& s = select_scratch<kThreads>();
  const uint32_t below = (1u << lane()) - 1;
  if (cut.ties == 0) {  // a key above another is not zero, nor is its entry
    int count = 0;
    row.template in_batches<2>(
        own, [&](int, const int(&key)[2], unsigned) { count += (key[0] > cut.key) + (key[1] > cut.key); });
    count = __reduce_add_sync(~0u, count);
    if (lane() == 0) s.warp_sum[warp()] = count;
    __syncthreads();
    const int of_warp = lane() < kWarps ? s.warp_sum[lane()] : 0;
    int place = __reduce_add_sync(~0u, lane() < warp() ? of_warp : 0);
    row.template in_batches<2>(own, [&](int first, const int(&key)[2], unsigned there) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool kept = key[i] > cut.key;
        const uint32_t mask = __ballot_sync(~0u, kept);
        const int e = own.entry(first + i * kWarp);
        if (kept) {
          take(place + __popc(mask & below), e);
        } else if (there >> i & 1) {
          leave(e);
        }
        place += __popc(mask);
      }
    });
    return __reduce_add_sync(~0u, of_warp);
  }
  const bool ranked = cut.ties < kAllTies;
  int ties_before = 0;
  if (ranked) {
    int ties = 0;
    row.template each<1>([&](int, int key) { ties += __popc(__ballot_sync(~0u, key == cut.key)); });
    if (lane() == 0) s.warp_ties[warp()] = ties;
    __syncthreads();
    ties_before = before_warp(s.warp_ties, warp());
  }
  const auto each_own = [&](const auto& body) {
    int ties = ties_before;
    row.template each<1>([&](int e, int key) {
      bool kept = key > cut.key || key == cut.key;
      if (ranked) {
        const bool tie = key == cut.key;
        const uint32_t mask = __ballot_sync(~0u, tie);
        if (tie) kept = ties + __popc(mask & below) < cut.ties;
        ties += __popc(mask);
      }
      const bool here = key != kNoKey && own.has(e);
      const bool present = here && kept && __float_as_uint(row.value(e)) != 0;
      body(e, here, __ballot_sync(~0u, present), present);
    });
  };
  int count = 0;
  each_own([&](int, bool, uint32_t mask, bool) { count += __popc(mask); });
  if (lane() == 0) s.warp_sum[warp()] = count;
  __syncthreads();
  int place = before_warp(s.warp_sum, warp());
  each_own([&](int e, bool here, uint32_t mask, bool present) {
    if (present) {
      take(place + __popc(mask & below), e);
    } else if (here) {
      leave(e);
    }
    place += __popc(mask);
  });
  return before_warp(s.warp_sum, kWarps);
}

}  // namespace larosa::cuda
