// A row's entries and the keys they are selected by: in registers, or in memory where the row is longer than
// a block's registers hold.
#pragma once

#include <type_traits>

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// Threads of a block that makes a row.
inline constexpr int kRowThreads = 512, kRowWarps = kRowThreads / kWarp;

/// Keys order like scores and are not negative.
inline constexpr int kNanKey = 0x7fffffff;

/// The score |x · scale| as ordered bits; a NaN is the largest.
__device__ inline int score_key(float score) {
  return isnan(score) ? kNanKey : __float_as_int(fabsf(score));
}

/// The norm of an entry; gain: the norm's, or null.
__device__ inline float norm_entry(float x, float factor, const float* gain, int e) {
  const float y = __fmul_rn(x, factor);
  return gain ? __fmul_rn(y, gain[e]) : y;
}
__device__ inline float norm_factor(float square_sum, int cols, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(square_sum, static_cast<float>(cols)), eps)));
}

/// A share of a row: every `of`-th entry, from `first` on. Blocks that share a product list their own entries
/// only, a quarter each.
struct Own {
  int first = 0, of = 1;

  __device__ int entry(int i) const { return i * of + first; }
  __device__ int count(int cols) const { return (cols - first + of - 1) / of; }
};

/// How a block's threads share a row of up to kMost entries: a warp has one run of it, a thread kVectors
/// vectors of four entries side by side, these.
template <int kVectors>
struct Places {
  static constexpr int kMost = kVectors * 4 * kRowThreads;

  int first;

  __device__ int vector(int v) const { return first + v * kWarp; }
  __device__ int entry(int v, int i) const { return vector(v) * 4 + i; }
};
__device__ inline int first_vector(int vectors) {
  const int thread = thread_anew();
  return thread / kWarp * vectors * kWarp + thread % kWarp;
}
template <int kVectors>
__device__ Places<kVectors> own_places() {
  return {first_vector(kVectors)};
}

/// The row's entries in a block's registers.
template <int kVectors>
struct Vectors {
  Places<kVectors> at;
  float x[kVectors][4];

  /// Starts reading it. What is there beyond the row is anything.
  __device__ void load(const float* from, int cols) {
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && cols % 4 == 0) {
      // Addresses are kept within the row: a load that may not happen is waited for before the next one.
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(from) + min(at.vector(v), cols / 4 - 1));
        x[v][0] = four.x, x[v][1] = four.y, x[v][2] = four.z, x[v][3] = four.w;
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[v][i] = __ldcg(from + min(at.entry(v, i), cols - 1));
      }
    }
  }
  __device__ void store(float* to, int cols) const {
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && cols % 4 == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (at.entry(v, 0) < cols)
          reinterpret_cast<float4*>(to)[at.vector(v)] = {x[v][0], x[v][1], x[v][2], x[v][3]};
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at.entry(v, i) < cols) to[at.entry(v, i)] = x[v][i];
        }
      }
    }
  }
  /// Beyond the row are vectors of +0.
  __device__ void clear_beyond(int cols) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] = at.entry(v, i) < cols ? x[v][i] : 0;
    }
  }
  __device__ float square_sum(float* reduced) const {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum = fmaf(x[v][i], x[v][i], sum);
    }
    return block_reduce<kRowThreads>(sum, reduced, Add());
  }
};
/// Who else looks for the row's cut: nobody (select.cuh).
struct Alone;

/// The keys of a row in a block's registers. Nothing is asked of an entry whether it is there. Keys in shared
/// memory, which every pass read again, took twice as long (4096 entries with norm and selection 3.7 µs, 1.9
/// from registers; 11008 without a norm 5.4 and 2.7).
template <int kVectors, class Sharing = Alone>
struct HeldKeys {
  using Blocks = Sharing;
  static constexpr int kBinBits = kVectors <= 2 ? 11 : 12;  // more are summed up more slowly

  Places<kVectors> at;
  int key[kVectors][4];

  /// body(e, key) of a thread's entries, in any order.
  template <class Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(at.entry(v, i), key[v][i]);
    }
  }
};
/// Element `rank` of four in registers.
template <class T>
__device__ T pick_of(const T (&four)[4], int rank) {
  return rank & 2 ? (rank & 1 ? four[3] : four[2]) : (rank & 1 ? four[1] : four[0]);
}

/// The fewest vectors of a thread that have room for so many entries. Their number, and so the order in which
/// a thread has the entries, depends on nothing else.
__host__ __device__ inline int vectors_for(int cols) {
  return cols <= Places<2>::kMost   ? 2
         : cols <= Places<4>::kMost ? 4
         : cols <= Places<6>::kMost ? 6
         : cols <= Places<8>::kMost ? 8
                                    : 10;
}
static_assert(kMostHeld == Places<10>::kMost);
/// use(n) with that number as a constant.
template <class Use>
__device__ void with_vectors(int cols, const Use& use) {
  switch (vectors_for(cols)) {
    case 2:
      return use(std::integral_constant<int, 2>());
    case 4:
      return use(std::integral_constant<int, 4>());
    case 6:
      return use(std::integral_constant<int, 6>());
    case 8:
      return use(std::integral_constant<int, 8>());
    default:
      return use(std::integral_constant<int, 10>());
  }
}

/// A row in memory, of any length; its keys are made anew in every pass.
template <class Sharing>
struct MemoryRow {
  using Blocks = Sharing;
  static constexpr int kBinBits = 12;

  const float* x;
  const float* scale;  // or null
  int cols;

  template <class Body>
  __device__ void each(const Body& body) const {
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < cols; e += kRowThreads)
      body(e, score_key(scale ? __fmul_rn(x[e], scale[e]) : x[e]));
  }
};

}  // namespace larosa::cuda
