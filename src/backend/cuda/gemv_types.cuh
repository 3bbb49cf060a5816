// How a thread reads 16 bytes of a channel, a vector, and adds x times them to its sums: one struct per
// stored type.
#pragma once

#include <type_traits>

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// How a weight's channels are read: a struct each.
enum class Format { f32, f16, bf16, int8, int4, loose_f32, loose_f16, loose_bf16 };

/// A vector of a channel is read at its address and `extra`: how far its scales are, where it has some.
/// Vector v has kLane outputs, which are side by side but for int4's (Nibbles::output). A thread has kHalf
/// channels on their way while it adds kHalf others (channels.cuh): more were slower (8 layers of 7B dense,
/// int8: 3 make 1451 tokens/s, 4 1400; int4: 2 make 1694, 3 1613).
/// kSums: a thread's sums, the outputs' first; where there are others, `settle` says what for.
template <class T>
struct Plain {
  static constexpr int kLane = 16 / sizeof(T), kSums = kLane, kHalf = 3;
  using Loaded = uint4;

  __device__ static int extra(int, int) { return 0; }
  __device__ static Loaded load(const char* at, int) { return load_stream(at); }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kSums]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) add_word(words[w], x, &sum[w * kLane / 4]);
  }

 private:
  __device__ static void add_word(uint32_t word, float x, float* sum) {
    if constexpr (sizeof(T) == 4) {
      sum[0] = fmaf(x, __uint_as_float(word), sum[0]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      sum[0] = fmaf(x, __uint_as_float(word << 16), sum[0]);
      sum[1] = fmaf(x, __uint_as_float(word & 0xffff0000u), sum[1]);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
      sum[0] = fmaf(x, pair.x, sum[0]);
      sum[1] = fmaf(x, pair.y, sum[1]);
    }
  }
};

/// Levels and, further on, their scales.
template <class Loaded>
__device__ Loaded load_levels(const char* at, int extra) {
  Loaded v;
  load_once(at, v.q);
  load_once(at + extra, v.scale);
  return v;
}

/// int8 lines: P bytes, then one f16 scale per 128 outputs.
struct Bytes {
  static constexpr int kLane = 16, kSums = kLane, kHalf = 3;
  struct Loaded {
    uint4 q;
    uint16_t scale;  // f16
  };

  __device__ static int extra(int v, int padded) { return padded + v / 8 * 2 - v * 16; }
  /// Byte b of a word: 2^23 + n is 0x4b000000 + n as float32 bits, which needs no conversion.
  __device__ static float level(uint32_t word, int b) {
    const uint32_t offset = word ^ 0x80808080u;  // q + 128
    return __uint_as_float(__byte_perm(offset, 0x4b000000u, 0x7540 + b)) - (8388608.0f + 128);
  }
  __device__ static float scale(const Loaded& v) { return __half2float(__ushort_as_half(v.scale)); }
  __device__ static Loaded load(const char* at, int extra) { return load_levels<Loaded>(at, extra); }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kSums]) {
    const float xs = __fmul_rn(x, scale(v));
    const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int b = 0; b < 4; ++b) sum[4 * w + b] = fmaf(xs, level(words[w], b), sum[4 * w + b]);
    }
  }
};

/// int4 lines: per 128 outputs 16 words, nibble k of word w is output 16k + w; then one f16 scale per 32
/// outputs. Four vectors share 128 outputs, each has four words.
struct Nibbles {
  static constexpr int kLane = 32, kSums = kLane + 4, kHalf = 2;
  struct Loaded {
    uint4 q;
    uint2 scale;  // four f16
  };
  struct Scales {
    float of[4];
  };

  __device__ static int extra(int v, int padded) { return padded / 2 + v / 4 * 8 - v * 16; }
  /// Nibble k of a word, which is 8 above its level, and 128: as float32 bits 128 + n is 0x43000000 +
  /// (n << 16), so that one instruction makes it of its byte. Sums take kRaised off once at the end (the sum
  /// of x · scale is a sum of its own), which costs them some 5 of 24 bits: 8 layers of 7B 1522 → 1599
  /// tokens/s dense, 1687 → 1737 at 50 %.
  static constexpr float kRaised = 136;
  __device__ static float raised(uint32_t word, int k) {
    const uint32_t nibbles = (k % 2 ? word >> 4 : word) & 0x0f0f0f0fu;
    return __uint_as_float(__byte_perm(nibbles, 0x43000000u, 0x7044 + (k / 2 << 8)));
  }
  __device__ static Scales scales(const Loaded& v) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&v.scale.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&v.scale.y));
    return {{low.x, low.y, high.x, high.y}};
  }
  __device__ static Loaded load(const char* at, int extra) { return load_levels<Loaded>(at, extra); }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kSums]) {
    Scales xs = scales(v);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      xs.of[g] = __fmul_rn(x, xs.of[g]);
      sum[kLane + g] = __fadd_rn(sum[kLane + g], xs.of[g]);
    }
    const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[8 * w + k] = fmaf(xs.of[k / 2], raised(words[w], k), sum[8 * w + k]);
    }
  }
  __device__ static void settle(float (&sum)[kSums]) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum[i] = fmaf(-kRaised, sum[kLane + i % 8 / 2], sum[i]);
  }
  /// Of a thread's sums those of whole vectors stand side by side: the output of column c.
  __device__ static int output(int c) {
    const int v = c / kLane, i = c % kLane;
    return v / 4 * 128 + 16 * (i % 8) + 4 * (v % 4) + i / 8;
  }
};

/// Weights whose lines are not multiples of 16 bytes: element by element.
template <class T>
struct Unaligned {
  static constexpr int kLane = 16 / sizeof(T), kSums = kLane, kHalf = 1;
  struct Loaded {
    T element[kLane];
  };

  __device__ static int extra(int v, int padded) { return padded - v * kLane; }  // elements that are left
  __device__ static Loaded load(const char* at, int extra) {
    Loaded loaded = {};
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (i < extra) loaded.element[i] = reinterpret_cast<const T*>(at)[i];
    }
    return loaded;
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kSums]) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum[i] = fmaf(x, widen(v.element[i]), sum[i]);
  }
};

/// Outputs of a vector are two to this power.
__host__ __device__ constexpr int lane_shift(Format f) {
  return f == Format::int4 ? 5 : f == Format::int8 ? 4 : f == Format::f32 || f == Format::loose_f32 ? 2 : 3;
}
__host__ __device__ constexpr int lane_of(Format f) {
  return 1 << lane_shift(f);
}
static_assert(lane_of(Format::int4) == Nibbles::kLane && lane_of(Format::int8) == Bytes::kLane &&
              lane_of(Format::f32) == Plain<float>::kLane && lane_of(Format::bf16) == Plain<__half>::kLane);
/// Outputs of what is shared out: a sector of 32 bytes, the least that a multiprocessor can ask for, which
/// came twice where tiles began within one (8 layers of 7B dense, bf16 947 → 973 tokens/s, int8 1451 → 1469).
/// At int4 half of one, since a whole one is 64 outputs: then some tiles had a seventh more than others (1722
/// → 1745 dense, level at 50 %; whole blocks of 128: 1679).
__host__ __device__ constexpr int granule_of(Format f) {
  return f < Format::int4 ? 2 * lane_of(f) : lane_of(f);
}
static_assert(4 * granule_of(Format::f32) == 32 && 2 * granule_of(Format::f16) == 32 &&
              2 * granule_of(Format::bf16) == 32 && granule_of(Format::int8) == 32 &&
              granule_of(Format::int4) == 32);  // half a byte each
/// The output of a weight's column c: columns are its vectors' outputs, one vector after the other.
__device__ inline int output_of(Format f, int c) {
  return f == Format::int4 ? Nibbles::output(c) : c;
}

}  // namespace larosa::cuda
