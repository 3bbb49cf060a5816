// Selection inside one block: the row that a product reads, which of its entries count, and their list in the
// order of the index. Every product's blocks do this for themselves: it costs each about 2 µs, a launch of
// its own costs as much and the launch on top.
//
// The cut is found digit by digit (11, 10, 10 bits) of the score's bits, which order non-negative floats, in
// a histogram of integers: exact, and the same bits whatever the order of the additions.
#pragma once

#include "backend/cuda/device.cuh"
#include "backend/cuda/kernels.h"

namespace larosa::cuda {

inline constexpr int kBins = 2048;
inline constexpr uint32_t kNanKey = 0x7fffffffu;

/// Entries with a key above `key` are kept, and the first `ties` of those that have it.
struct Cut {
  uint32_t key;
  int ties;
};

template <int kThreads>
struct SelectScratch {
  static constexpr int kWarps = kThreads / kWarp;
  uint32_t bins[kBins];
  int warp_sum[kWarps], warp_ties[kWarps];
  float reduced[kWarps];
  int bin, above, inside;
};

/// Sum over the warps before `end`, this one unless said otherwise.
template <int kThreads>
__device__ int before_warp(const int* sums, int end = warp()) {
  static_assert(kThreads / kWarp <= kWarp);
  return warp_reduce(lane() < end ? sums[lane()] : 0, Add());
}

/// The score |x|·scale as ordered bits; a NaN is the largest.
__device__ inline uint32_t score_key(float x, const float* scale, int i) {
  float s = fabsf(x);
  if (scale) s = __fmul_rn(s, scale[i]);
  return isnan(s) ? kNanKey : __float_as_uint(s);
}

/// The digit's bin in which the keep-th largest key lies: s.bin, keys above it (s.above), keys in it
/// (s.inside). Clears the bins.
template <int kThreads>
__device__ void find_bin(int keep, SelectScratch<kThreads>& s) {
  constexpr int kEach = kBins / kThreads;
  const int first = kBins - kEach * (static_cast<int>(threadIdx.x) + 1);  // thread 0 has the largest
  int own[kEach], sum = 0;
#pragma unroll
  for (int b = 0; b < kEach; ++b) {
    own[b] = static_cast<int>(s.bins[first + b]);
    s.bins[first + b] = 0;
    sum += own[b];
  }
  int upto = sum;  // of this warp's threads up to this one
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(~0u, upto, step);
    if (lane() >= step) upto += before;
  }
  if (lane() == kWarp - 1) s.warp_sum[warp()] = upto;
  __syncthreads();
  int above = upto - sum + before_warp<kThreads>(s.warp_sum);
  if (above < keep && keep <= above + sum) {
#pragma unroll
    for (int b = kEach - 1; b >= 0; --b) {
      if (above < keep && keep <= above + own[b]) {
        s.bin = first + b;
        s.above = above;
        s.inside = own[b];
      }
      above += own[b];
    }
  }
  __syncthreads();
}

/// The cut that keeps exactly `keep` ≥ 1 of the row's entries. s.bins are zero before and after.
template <int kThreads, class Row>
__device__ Cut find_cut(const Row& row, int keep, SelectScratch<kThreads>& s) {
  constexpr int kShift[] = {20, 10, 0}, kMask[] = {0x7ff, 0x3ff, 0x3ff};
  uint32_t prefix = 0;
#pragma unroll
  for (int digit = 0; digit < 3; ++digit) {
    const int above_shift = digit == 0 ? 31 : kShift[digit - 1];
    row.each([&](int, bool valid, float, uint32_t key) {
      if (valid && key >> above_shift == prefix)
        atomicAdd(&s.bins[(key >> kShift[digit]) & kMask[digit]], 1u);
    });
    __syncthreads();
    find_bin(keep, s);
    prefix = digit == 0 ? s.bin : prefix << 10 | static_cast<uint32_t>(s.bin);
    keep -= s.above;
    if (keep == s.inside) {  // the whole bin: no need to look into it
      if (prefix == 0) return {0, 1 << 30};
      return {(prefix << kShift[digit]) - 1, 0};
    }
  }
  return {prefix, keep};
}

/// Hands the kept entries to take(place, index, value), in the order of the index, zeros left out; returns
/// (entries, kept). Each warp has one run of the row.
template <int kThreads, class Row, class Take>
__device__ int2 compact(const Row& row, Cut cut, SelectScratch<kThreads>& s, const Take& take) {
  const auto present = [](float value) { return __float_as_uint(value) != 0; };
  const bool ranked = cut.ties > 0 && cut.ties < 1 << 30;
  int ties_before = 0;
  if (ranked) {
    int ties = 0;
    row.each([&](int, bool valid, float, uint32_t key) {
      ties += __popc(__ballot_sync(~0u, valid && key == cut.key));
    });
    if (lane() == 0) s.warp_ties[warp()] = ties;
    __syncthreads();
    ties_before = before_warp<kThreads>(s.warp_ties);
  }
  const auto each_kept = [&](const auto& body) {
    int ties = ties_before;
    row.each([&](int i, bool valid, float value, uint32_t key) {
      bool kept = valid && (key > cut.key || (key == cut.key && cut.ties > 0));
      if (ranked) {
        const bool tie = valid && key == cut.key;
        const uint32_t mask = __ballot_sync(~0u, tie);
        if (tie) kept = ties + __popc(mask & ((1u << lane()) - 1)) < cut.ties;
        ties += __popc(mask);
      }
      body(i, kept, value);
    });
  };
  int count = 0, kept_count = 0;
  each_kept([&](int, bool kept, float value) {
    kept_count += __popc(__ballot_sync(~0u, kept));
    count += __popc(__ballot_sync(~0u, kept && present(value)));
  });
  __syncthreads();
  if (lane() == 0) {
    s.warp_sum[warp()] = count;
    s.warp_ties[warp()] = kept_count;
  }
  __syncthreads();
  int place = before_warp<kThreads>(s.warp_sum);
  each_kept([&](int i, bool kept, float value) {
    const bool listed = kept && present(value);
    const uint32_t mask = __ballot_sync(~0u, listed);
    if (listed) take(place + __popc(mask & ((1u << lane()) - 1)), i, value);
    place += __popc(mask);
  });
  return {before_warp<kThreads>(s.warp_sum, kThreads / kWarp),
          before_warp<kThreads>(s.warp_ties, kThreads / kWarp)};
}

/// What a rule keeps of a row.
template <int kThreads, class Row>
__device__ Cut cut_of(const Row& row, const Input& in, SelectScratch<kThreads>& s) {
  if (in.select == Selects::all || (in.select == Selects::topk && in.keep == in.cols)) return {0, 1 << 30};
  if (in.select == Selects::threshold) {  // keys are the bits of non-negative floats: so is the cut
    if (in.cut < 0) return {0, 1 << 30};
    return {in.cut == 0 ? 0u : __float_as_uint(in.cut), 0};
  }
  if (in.keep == 0) return {kNanKey, 0};
#pragma unroll 1
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) s.bins[b] = 0;
  __syncthreads();
  return find_cut(row, in.keep, s);
}

__device__ inline float norm_factor(float sum, int cols, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(cols)), eps)));
}
__device__ inline float norm_entry(float x, float factor, const float* gain, int e) {
  const float y = __fmul_rn(x, factor);
  return gain ? __fmul_rn(y, __ldg(gain + e)) : y;
}

/// A row in memory, shared or global, of any length. Rolled loops: what runs once per launch is bound by
/// fetching its instructions (unrolled in registers, this file was 50 to 170 KB of code and cost 15 to 50 µs
/// a launch).
template <int kThreads>
struct MemoryRow {
  const float* x;
  const float* scale;
  int cols;

  template <class Body>
  __device__ void each(const Body& body) const {
    const int steps = (cols + kThreads - 1) / kThreads, first = warp() * steps * kWarp + lane();
#pragma unroll 2
    for (int i = 0; i < steps; ++i) {
      const int e = first + i * kWarp;
      const float value = e < cols ? x[e] : 0;
      body(e, e < cols, value, e < cols ? score_key(value, scale, e) : 0);
    }
  }
};

/// A row in shared memory with its keys beside it: a pass over it is a load and a compare.
template <int kThreads>
struct KeyedRow {
  const float* values;
  const uint32_t* keys;
  int cols;

  template <class Body>
  __device__ void each(const Body& body) const {
    const int steps = (cols + kThreads - 1) / kThreads, first = warp() * steps * kWarp + lane();
#pragma unroll 4
    for (int i = 0; i < steps; ++i) {
      const int e = first + i * kWarp;
      const bool valid = e < cols;
      body(e, valid, valid ? values[e] : 0, valid ? keys[e] : 0);
    }
  }
};

}  // namespace larosa::cuda
