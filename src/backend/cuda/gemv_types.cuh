// How a thread reads 16 bytes of a channel, a vector, and adds x times them to its sums: one struct per
// stored type.
#pragma once

#include <type_traits>

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// How a weight's channels are read: a struct each.
enum class Format { f32, f16, bf16, int8, int4, loose_f32, loose_f16, loose_bf16 };

/// A vector of a channel is read at its address and `extra`: how far its scales are, where it has some.
/// Vector v has kLane outputs. kGranule outputs hold whole vectors and can be shared out. A thread has kAhead
/// channels in flight: six of 512 threads, 48 KB per multiprocessor, hide 1.5 µs at 4.3 TB/s.
template <class T>
struct Plain {
  static constexpr int kLane = 16 / sizeof(T), kGranule = kLane, kAhead = 6;
  using Loaded = uint4;

  __device__ static int extra(int, int) { return 0; }
  __device__ static Loaded load(const char* at, int) { return load_stream(at); }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
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

/// 2^23 + n as float32 bits is 0x4b000000 + n: an integer below 2^23 becomes a float without a conversion.
inline constexpr uint32_t kMagic = 0x4b000000u;

/// int8 lines: P bytes, then one f16 scale per 128 outputs.
struct Bytes {
  static constexpr int kLane = 16, kGranule = kLane, kAhead = 6;
  struct Loaded {
    uint4 q;
    __half scale;
  };

  __device__ static int extra(int v, int padded) { return padded + v / 8 * 2 - v * 16; }
  /// Byte b of a word.
  __device__ static float level(uint32_t word, int b) {
    const uint32_t offset = word ^ 0x80808080u;  // q + 128
    return __uint_as_float(__byte_perm(offset, kMagic, 0x7540 + b)) - (8388608.0f + 128);
  }
  __device__ static Loaded load(const char* at, int extra) {
    return {load_stream(at), __ldg(reinterpret_cast<const __half*>(at + extra))};
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
    const float xs = __fmul_rn(x, __half2float(v.scale));
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
  static constexpr int kLane = 32, kGranule = 128, kAhead = 6;
  struct Loaded {
    uint4 q;
    uint2 scale;  // four f16
  };

  __device__ static int extra(int v, int padded) { return padded / 2 + v / 4 * 8 - v * 16; }
  /// Nibble k of a word, where it is: 16^(k mod 4) times too large, which its factor takes back exactly.
  __device__ static float level(uint32_t word, int k) {
    const int place = 4 * (k % 4);
    const uint32_t half = k < 4 ? word : word >> 16;
    return __uint_as_float(pick(half, 0xfu << place, kMagic)) - (8388608.0f + (8 << place));
  }
  __device__ static constexpr float factor(int k) { return 1.0f / (1 << 4 * (k % 4)); }
  __device__ static Loaded load(const char* at, int extra) {
    return {load_stream(at), __ldg(reinterpret_cast<const uint2*>(at + extra))};
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&v.scale.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&v.scale.y));
    const float scaled[4] = {__fmul_rn(x, low.x), __fmul_rn(x, low.y), __fmul_rn(x, high.x),
                             __fmul_rn(x, high.y)};
    const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        sum[8 * w + k] = fmaf(scaled[k / 2] * factor(k), level(words[w], k), sum[8 * w + k]);
    }
  }
  __device__ static int column(int v, int i) {
    return v / 4 * 128 + 16 * (i % 8) + 4 * (v % 4) + i / 8;
  }
};

/// Weights whose lines are not multiples of 16 bytes: element by element.
template <class T>
struct Unaligned {
  static constexpr int kLane = 16 / sizeof(T), kGranule = kLane, kAhead = 2;
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
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
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
/// Outputs of the fewest whole vectors that hold a run of outputs.
__host__ __device__ constexpr int granule_of(Format f) {
  return f == Format::int4 ? Nibbles::kGranule : lane_of(f);
}

}  // namespace larosa::cuda
