// How one warp reads 16 bytes per lane of a channel and adds x times them to its sums: a row per stored type.
#pragma once

#include <type_traits>

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// 16 bytes that are read once. No branch and no predicate around it: the compiler would wait for each load.
__device__ inline uint4 load_stream(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

/// Lane l of a tile has kLane outputs from l · kLane on; a warp has kAhead channels in flight: eight of 512
/// bytes, 64 KB per multiprocessor, hide 0.8 µs at 4.3 TB/s.
template <class T>
struct Plain {
  static constexpr int kLane = 16 / sizeof(T), kAhead = 8;
  using Loaded = uint4;

  __device__ static int64_t offset(int64_t first, int l) {
    return (first + l * kLane) * static_cast<int64_t>(sizeof(T));
  }
  __device__ static Loaded load(const char* line, int64_t first, int l, int64_t) {
    return load_stream(line + offset(first, l));
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) add_word(words[w], x, &sum[w * kLane / 4]);
  }
  __device__ static int output(int l, int i) {
    return l * kLane + i;
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
  static constexpr int kLane = 16, kAhead = 8;
  struct Loaded {
    uint4 q;
    float scale;
  };

  __device__ static int64_t offset(int64_t first, int l) { return first + l * kLane; }
  __device__ static Loaded load(const char* line, int64_t first, int l, int64_t padded) {
    const int64_t at = offset(first, l);
    const __half* scale = reinterpret_cast<const __half*>(line + padded) + at / 128;
    return {load_stream(line + at), __half2float(__ldg(scale))};
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
    const float xs = __fmul_rn(x, v.scale);
    const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t offset = words[w] ^ 0x80808080u;  // q + 128
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float q = __uint_as_float(__byte_perm(offset, kMagic, 0x7540 + b)) - (8388608.0f + 128);
        sum[4 * w + b] = fmaf(xs, q, sum[4 * w + b]);
      }
    }
  }
  __device__ static int output(int l, int i) {
    return l * kLane + i;
  }
};

/// int4 lines: per 128 outputs 16 words, nibble k of word w is output 16k + w; then one f16 scale per 32
/// outputs. Four lanes share 128 outputs, each has four words.
struct Nibbles {
  static constexpr int kLane = 32, kAhead = 4;
  struct Loaded {
    uint4 q;
    uint2 scale;  // four f16
  };

  __device__ static int64_t offset(int64_t first, int l) { return (first + l * kLane) / 2; }
  __device__ static Loaded load(const char* line, int64_t first, int l, int64_t padded) {
    const int64_t at = first + l * kLane;
    const uint2* scale = reinterpret_cast<const uint2*>(line + padded / 2) + at / 128;
    return {load_stream(line + at / 2), __ldg(scale)};
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
      for (int k = 0; k < 8; ++k) {
        // The nibble stays where it is: 16^(k mod 4) times too large, which its factor takes back exactly.
        const uint32_t word = k < 4 ? words[w] : words[w] >> 16;
        const int place = 4 * (k % 4);
        const float q = __uint_as_float((word & (0xfu << place)) | kMagic) - (8388608.0f + (8 << place));
        sum[8 * w + k] = fmaf(scaled[k / 2] * (1.0f / (1 << place)), q, sum[8 * w + k]);
      }
    }
  }
  __device__ static int output(int l, int i) {
    return l / 4 * 128 + 16 * (i % 8) + 4 * (l % 4) + i / 8;
  }
};

}  // namespace larosa::cuda
