// How a cache stores keys and values (KvShape): elements, or int8 levels with a scale for each head and
// position.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "backend/cuda/device.cuh"

namespace larosa::cuda {

/// True when a cache keeps levels and a scale.
template <class T>
inline constexpr bool kLevels = std::is_same_v<T, int8_t>;

/// Where a head's position stands: `head_dim` elements, and with int8 a scale.
__device__ inline int64_t place_of(const CacheLayer& c, int64_t head, int64_t position) {
  return head * c.capacity + position;
}

/// What scores are multiplied by.
inline float score_scale(int64_t head_dim) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
}

struct Most {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return max(a, b); }
};
/// One head's key or value, entry(e) of it, as levels and a scale (KvShape); by one warp.
template <class Entry>
__device__ void store_levels(const Entry& entry, int width, int8_t* to, float* scale) {
  float x[kWidestHead / kWarp];
  uint32_t bits = 0;  // of |x|: integers order like them and let no NaN slip through
#pragma unroll
  for (int i = 0; i < kWidestHead / kWarp; ++i) {
    const int e = lane() + i * kWarp;
    x[i] = e < width ? entry(e) : 0.0f;
    bits = max(bits, __float_as_uint(x[i]) & 0x7fffffffu);
  }
  const float most = __uint_as_float(warp_reduce(bits, Most()));
  const bool tiny = most < 0x1p-100f, good = !tiny && most <= FLT_MAX;
  const float inverse = __fdiv_rn(127.0f, most);
#pragma unroll
  for (int i = 0; i < kWidestHead / kWarp; ++i) {
    const int e = lane() + i * kWarp;
    if (e < width) to[e] = static_cast<int8_t>(good ? __float2int_rn(__fmul_rn(x[i], inverse)) : 0);
  }
  if (lane() == 0) *scale = good ? __fdiv_rn(most, 127.0f) : tiny ? 0.0f : NAN;
}

/// Element e of a stored key or value.
template <class T>
__device__ float stored(const void* elements, const float* scales, int64_t place, int width, int e) {
  const float v = widen(static_cast<const T*>(elements)[place * width + e]);
  if constexpr (kLevels<T>) {
    return __fmul_rn(scales[place], v);
  } else {
    return v;
  }
}

/// Elements as they are stored, read at once: levels without their scale.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Piece {
  T element[kVector];
};

}  // namespace larosa::cuda
