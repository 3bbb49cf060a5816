// A row's entries, in batches, and the keys they are selected by.
#pragma once

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// Keys order like scores and are not negative; entries that are not there have kNoKey.
inline constexpr int kNanKey = 0x7fffffff, kNoKey = -1;

/// The score |x · scale| as ordered bits; a NaN is the largest.
__device__ inline int score_key(float x, const float* scale, int i) {
  const float s = scale ? __fmul_rn(x, scale[i]) : x;
  return isnan(s) ? kNanKey : __float_as_int(fabsf(s));
}

/// The norm of an entry; gain: the norm's, or null.
__device__ inline float norm_entry(float x, float factor, const float* gain, int e) {
  const float y = __fmul_rn(x, factor);
  return gain ? __fmul_rn(y, gain[e]) : y;
}

/// A share of a row: every `of`-th entry, from `first` on. Blocks that share a product list their own entries
/// only, a quarter each.
struct Own {
  int first = 0, of = 1;

  __device__ int entry(int i) const { return i * of + first; }
  __device__ int count(int cols) const { return (cols - first + of - 1) / of; }
  __device__ bool has(int e) const { return e % of == first; }
};

/// Entries of a thread: every warp has one run, of whole steps of 32.
template <int kThreads>
struct Run {
  int steps, first;

  __device__ explicit Run(int cols)
      : steps((cols + kThreads - 1) / kThreads), first(warp() * steps * kWarp + lane()) {}
  __device__ int entry(int step) const { return first + step * kWarp; }
};

/// use(first, batch, there) of kBatch entries of a thread at a time, numbers first, first + kWarp, … of a
/// share: what load(e) gives of them, all read before anything is written, or `none` where bit i of `there`
/// is not set, beyond the row. The compiler would not dare to read one behind another's writing, and wait for
/// each. Batches that every lane has whole ask no more: a row is bound by such instructions.
template <int kThreads, int kBatch, class T, class Load, class Use>
__device__ void batches(int cols, const Own& own, T none, const Load& load, const Use& use) {
  const int count = own.count(cols);
  const Run<kThreads> run(count);
  const int whole = min(run.steps, max(0, count - warp() * run.steps * kWarp) / kWarp);
  T batch[kBatch];
  int i = 0;
#pragma unroll 1
  for (; i + kBatch <= whole; i += kBatch) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = load(own.entry(run.entry(i + j)));
    use(run.entry(i), batch, (1u << kBatch) - 1);
  }
#pragma unroll 1
  for (; i < run.steps; i += kBatch) {
    unsigned there = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int number = run.entry(i + j);
      const bool in_row = i + j < run.steps && number < count;
      batch[j] = in_row ? load(own.entry(number)) : none;
      there |= static_cast<unsigned>(in_row) << j;
    }
    use(run.entry(i), batch, there);
  }
}

/// body(e, key) of every entry of a thread, with kNoKey beyond the row, so that a warp's lanes stay together.
template <int kThreads, int kUnroll, class Key, class Body>
__device__ void each_key(int cols, const Key& key, const Body& body) {
  const Run<kThreads> run(cols);
#pragma unroll kUnroll
  for (int i = 0; i < run.steps; ++i) {
    const int e = run.entry(i);
    body(e, e < cols ? key(e) : kNoKey);
  }
}

/// A row in memory, shared or global, of any length; its keys are made anew in every pass.
template <int kThreads>
struct MemoryRow {
  const float* x;
  const float* scale;
  int cols;

  __device__ float value(int i) const { return x[i]; }
  template <int kUnroll, class Body>
  __device__ void each(const Body& body) const {
    each_key<kThreads, kUnroll>(
        cols, [&](int e) { return score_key(x[e], scale, e); }, body);
  }
  template <int kBatch, class Body>
  __device__ void in_batches(const Own& own, const Body& body) const {
    batches<kThreads, kBatch>(
        cols, own, kNoKey, [&](int e) { return score_key(x[e], scale, e); }, body);
  }
};

/// A row whose keys are made, and stored, by the one pass over it. They take the place of its score weights.
/// So is its norm, if it is to have one.
template <int kThreads>
struct KeyingRow {
  float* x;
  float* scale;  // shared memory, where keys go in any case
  bool scaled;
  int cols;
  bool normed = false;
  float factor = 1;
  const float* gain = nullptr;

  template <int kBatch, class Body>
  __device__ void in_batches(const Own& own, const Body& body) const {
    if (!normed) return scaled ? make<kBatch, 0, true>(own, body) : make<kBatch, 0, false>(own, body);
    if (!gain) return scaled ? make<kBatch, 1, true>(own, body) : make<kBatch, 1, false>(own, body);
    scaled ? make<kBatch, 2, true>(own, body) : make<kBatch, 2, false>(own, body);
  }

 private:
  struct Entry {
    float value, scale;
  };
  /// kNorm: 0 none, 1 by the factor, 2 by the gain too. Nothing is asked of an entry.
  template <int kBatch, int kNorm, bool kScaled, class Body>
  __device__ void make(const Own& own, const Body& body) const {
    int* const keys = reinterpret_cast<int*>(scale);
    batches<kThreads, kBatch>(
        cols, own, Entry{0, 0},
        [&](int e) {
          const float value = kNorm > 0 ? norm_entry(x[e], factor, kNorm > 1 ? gain : nullptr, e) : x[e];
          return Entry{value, kScaled ? scale[e] : 1};
        },
        [&](int first, const Entry(&batch)[kBatch], unsigned there) {
          int key[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            key[i] = kNoKey;
            if (!(there >> i & 1)) continue;
            const int e = own.entry(first + i * kWarp);
            key[i] = score_key(batch[i].value, kScaled ? &batch[i].scale : nullptr, 0);
            keys[e] = key[i];
            if (kNorm > 0) x[e] = batch[i].value;
          }
          body(first, key, there);
        });
  }
};

/// A row whose keys stand in memory too. In registers they would want unrolled loops, 30 to 80 KB of code for
/// each length, and no pass became faster.
template <int kThreads>
struct KeyedRow {
  const float* x;
  const int* key;
  int cols;

  __device__ float value(int i) const { return x[i]; }
  template <int kUnroll, class Body>
  __device__ void each(const Body& body) const {
    each_key<kThreads, kUnroll>(
        cols, [&](int e) { return key[e]; }, body);
  }
  template <int kBatch, class Body>
  __device__ void in_batches(const Own& own, const Body& body) const {
    batches<kThreads, kBatch>(
        cols, own, kNoKey, [&](int e) { return key[e]; }, body);
  }
};

}  // namespace larosa::cuda
