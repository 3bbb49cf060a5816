// Selection inside one block: which entries of a row count, and their list in the order of the index. Every
// product's blocks do this for themselves: it costs each 1 to 2 µs, a launch of its own costs as much and the
// launch on top.
//
// The cut is found by counting the keys above two guesses at once and interpolating: about five passes of two
// compares an entry, with one barrier each, and the last pass has also counted what each warp will list.
#pragma once

#include "backend/cuda/device.cuh"
#include "backend/cuda/kernels.h"

namespace larosa::cuda {

/// Keys order like scores and are not negative; entries that are not there have kNoKey.
inline constexpr int kNanKey = 0x7fffffff, kNoKey = -1;

/// The score |x|·scale as ordered bits; a NaN is the largest.
__device__ inline int score_key(float x, const float* scale, int i) {
  float s = fabsf(x);
  if (scale) s = __fmul_rn(s, scale[i]);
  return isnan(s) ? kNanKey : __float_as_int(s);
}

/// Entries with a key above `key` are kept, and the first `ties` of those that have it.
struct Cut {
  int key = 0, ties = 0;
  const int2* warps = nullptr;  // what each warp has above `key`, or null: not counted
  bool second = false;          // …in .y
};
inline constexpr int kAllTies = 1 << 30;

template <int kThreads>
struct SelectScratch {
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp);
  int2 above[2][kWarps];  // of this pass and the one before
  int warp_sum[kWarps], warp_ties[kWarps];
  float reduced[kWarps];
  int guess;
};

/// The block's own, in shared memory.
template <int kThreads>
__device__ SelectScratch<kThreads>& select_scratch() {
  __shared__ SelectScratch<kThreads> scratch;
  return scratch;
}

/// Sum of the warps' values before warp `end`.
__device__ inline int before_warp(const int* sums, int end) {
  return __reduce_add_sync(~0u, lane() < end ? sums[lane()] : 0);
}

/// Entries of the row with keys above low and above high.
template <int kThreads, class Row>
__device__ int2 count_above(const Row& row, int low, int high, int2* warps) {
  constexpr int kWarps = kThreads / kWarp;
  int x = 0, y = 0;
  row.each([&](int, int key) {
    x += key > low;
    y += key > high;
  });
  x = __reduce_add_sync(~0u, x);
  y = __reduce_add_sync(~0u, y);
  if (lane() == 0) warps[warp()] = {x, y};
  __syncthreads();
  const int2 of_warp = lane() < kWarps ? warps[lane()] : int2{0, 0};
  return {__reduce_add_sync(~0u, of_warp.x), __reduce_add_sync(~0u, of_warp.y)};
}

/// Two cuts to try next, strictly inside the bracket.
struct Guesses {
  int low, high;
};

/// The cut that keeps exactly `keep` of the row's entries, 0 < keep < cols. guess: a key near it, or 0; it
/// decides how many passes are made, not what is found.
template <int kThreads, class Row>
__device__ Cut find_cut(const Row& row, int keep, int guess) {
  auto& s = select_scratch<kThreads>();
  constexpr int kPatience = 8;        // passes before the bracket is cut in three whatever it holds
  constexpr float kOctave = 8388608;  // keys from one power of two to the next
  // More than keep entries lie above low, fewer above high; `known`: it was counted.
  int low = kNoKey, high = kNanKey, above_low = row.cols, above_high = 0;
  bool low_known = false, high_known = false;
  float step = guess > 0 ? kOctave / 32 : kOctave / 2;
  const float start = guess > 0 ? static_cast<float>(guess) : static_cast<float>(0x3f000000);
  float try_low = start - step, try_high = start + step;  // rounded to 128 keys or less: they are guesses
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    const unsigned width = static_cast<unsigned>(high) - static_cast<unsigned>(low);
    const auto inside = [&](float at) {
      const float offset = fminf(fmaxf(at, 0.0f), 2147483520.0f);
      return static_cast<unsigned>(offset);
    };
    unsigned a, b;  // offsets from low
    if (low_known && high_known) {
      const int held = above_low - above_high;
      const float share = static_cast<float>(above_low - keep) / static_cast<float>(held);
      const float keys = static_cast<float>(width);
      const float spread = fmaxf(0.35f, 0.6f * sqrtf(static_cast<float>(held) * share * (1 - share)));
      const bool thirds = held <= 3 || pass >= kPatience;
      a = thirds ? width / 3 : inside(keys * (share - spread / static_cast<float>(held)));
      b = thirds ? width - width / 3 : inside(keys * (share + spread / static_cast<float>(held)));
    } else {
      a = inside(try_low - static_cast<float>(low));
      b = inside(try_high - static_cast<float>(low));
      if (pass >= kPatience) {
        a = width / 3;
        b = width - width / 3;
      }
    }
    a = min(max(a, 1u), width - 1);
    b = min(max(b, a), width - 1);
    const int first = static_cast<int>(static_cast<unsigned>(low) + a);
    const int second = static_cast<int>(static_cast<unsigned>(low) + b);
    int2* const warps = s.above[pass % 2];
    const int2 n = count_above<kThreads>(row, first, second, warps);
    if (n.x == keep) return {first, 0, warps, false};
    if (n.y == keep) return {second, 0, warps, true};
    if (n.x < keep) {
      high = first, above_high = n.x, high_known = true;
    } else if (n.y > keep) {
      low = second, above_low = n.y, low_known = true;
    } else {
      low = first, above_low = n.x, low_known = true;
      high = second, above_high = n.y, high_known = true;
    }
    if (static_cast<unsigned>(high) - static_cast<unsigned>(low) == 1) return {high, keep - above_high};
    if (low_known == high_known) continue;
    // A third of a normal row's entries lie in the octave around its median.
    step *= 4;
    const float slope = kOctave / (0.3f * static_cast<float>(row.cols));
    const float at = low_known ? static_cast<float>(low) + static_cast<float>(above_low - keep) * slope
                               : static_cast<float>(high) - static_cast<float>(keep - above_high) * slope;
    try_low = at - (low_known ? step / 4 : step);
    try_high = at + (low_known ? step : step / 4);
  }
}

/// What a rule keeps of a row.
template <int kThreads, class Row>
__device__ Cut cut_of(const Row& row, const Input& in, int guess) {
  if (in.select == Selects::all || (in.select == Selects::topk && in.keep == in.cols)) return {0, kAllTies};
  if (in.select == Selects::threshold) {  // keys are the bits of non-negative floats: so is the cut
    if (in.cut < 0) return {0, kAllTies};
    return {in.cut == 0 ? 0 : __float_as_int(in.cut), 0};
  }
  if (in.keep == 0) return {kNanKey, 0};
  return find_cut<kThreads>(row, in.keep, guess);
}

/// Hands the kept entries to take(place, index), in the order of the index, zeros left out; returns
/// (entries, kept). Each warp has one run of the row.
template <int kThreads, class Row, class Take>
__device__ int2 compact(const Row& row, const Cut& cut, const Take& take) {
  constexpr int kWarps = kThreads / kWarp;
  auto& s = select_scratch<kThreads>();
  const uint32_t below = (1u << lane()) - 1;
  if (cut.warps) {  // a key above another is not zero, nor is its entry
    const int own = lane() < kWarps ? (cut.second ? cut.warps[lane()].y : cut.warps[lane()].x) : 0;
    int place = __reduce_add_sync(~0u, lane() < warp() ? own : 0);
    row.each([&](int i, int key) {
      const bool kept = key > cut.key;
      const uint32_t mask = __ballot_sync(~0u, kept);
      if (kept) take(place + __popc(mask & below), i);
      place += __popc(mask);
    });
    const int total = __reduce_add_sync(~0u, own);
    return {total, total};
  }
  const bool ranked = cut.ties > 0 && cut.ties < kAllTies;
  int ties_before = 0;
  if (ranked) {
    int ties = 0;
    row.each([&](int, int key) { ties += __popc(__ballot_sync(~0u, key == cut.key)); });
    if (lane() == 0) s.warp_ties[warp()] = ties;
    __syncthreads();
    ties_before = before_warp(s.warp_ties, warp());
  }
  const auto each_kept = [&](const auto& body) {
    int ties = ties_before;
    row.each([&](int i, int key) {
      bool kept = key > cut.key || (key == cut.key && cut.ties > 0);
      if (ranked) {
        const bool tie = key == cut.key;
        const uint32_t mask = __ballot_sync(~0u, tie);
        if (tie) kept = ties + __popc(mask & below) < cut.ties;
        ties += __popc(mask);
      }
      const bool present = kept && __float_as_uint(row.value(i)) != 0;
      body(i, kept, __ballot_sync(~0u, present), present);
    });
  };
  int count = 0, kept_count = 0;
  each_kept([&](int, bool kept, uint32_t mask, bool) {
    kept_count += __popc(__ballot_sync(~0u, kept));
    count += __popc(mask);
  });
  __syncthreads();
  if (lane() == 0) {
    s.warp_sum[warp()] = count;
    s.warp_ties[warp()] = kept_count;
  }
  __syncthreads();
  int place = before_warp(s.warp_sum, warp());
  each_kept([&](int i, bool, uint32_t mask, bool present) {
    if (present) take(place + __popc(mask & below), i);
    place += __popc(mask);
  });
  return {before_warp(s.warp_sum, kWarps), before_warp(s.warp_ties, kWarps)};
}

/// Entries of a thread: every warp has one run, of whole steps of 32.
template <int kThreads>
struct Run {
  int steps, first;

  __device__ explicit Run(int cols)
      : steps((cols + kThreads - 1) / kThreads), first(warp() * steps * kWarp + lane()) {}
  __device__ int entry(int step) const { return first + step * kWarp; }
};

/// A row in memory, shared or global, of any length; its keys are made anew in every pass.
template <int kThreads>
struct MemoryRow {
  const float* x;
  const float* scale;
  int cols;

  __device__ float value(int i) const { return x[i]; }
  template <class Body>
  __device__ void each(const Body& body) const {
    const Run<kThreads> run(cols);
#pragma unroll 4
    for (int i = 0; i < run.steps; ++i) {
      const int e = run.entry(i);
      body(e, e < cols ? score_key(x[e], scale, e) : kNoKey);
    }
  }
};

/// A row in shared memory with its keys in registers: a pass over it is compares alone.
template <int kThreads, int kSteps>
struct KeyedRow {
  const float* x;
  int cols;
  int key[kSteps];

  __device__ float value(int i) const { return x[i]; }
  template <class Body>
  __device__ void each(const Body& body) const {
    const Run<kThreads> run(cols);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i < run.steps) body(run.entry(i), key[i]);
    }
  }
};

}  // namespace larosa::cuda
