// Storage ↔ float32: embedding rows, weight panels, the KV cache.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/embed.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE Floats widen_vector(const float* p) {
  return hn::LoadU(FloatTag(), p);
}
HWY_INLINE Floats widen_vector(const hwy::float16_t* p) {
  return widen_half(reinterpret_cast<const uint16_t*>(p));
}
HWY_INLINE Floats widen_vector(const hwy::bfloat16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::ScalableTag<uint32_t> d32;
  const auto half = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(d32, half)));
}

template <class Stored>
void widen_as(const Stored* from, DType dtype, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) hn::StoreU(widen_vector(from + i), FloatTag(), to + i);
  for (; i < n; ++i) to[i] = load_element(from, dtype, i);
}

void widen(const void* from, DType dtype, int64_t n, float* to) {
  if (dtype == DType::f32) return widen_as(static_cast<const float*>(from), dtype, n, to);
  if (dtype == DType::f16) return widen_as(static_cast<const hwy::float16_t*>(from), dtype, n, to);
  widen_as(static_cast<const hwy::bfloat16_t*>(from), dtype, n, to);
}

/// scale · q in float32, one rounding, as read_line does.
void widen_quantised(const std::byte* line, DType dtype, int64_t n, int64_t first, int64_t count, float* to) {
  const FloatTag d;
  const std::byte* scales = line + scales_offset(dtype, n);
  HWY_ALIGN float block[kQuantBlock];
  for (int64_t done = 0; done < count; done += kQuantBlock) {
    const int64_t at = first + done;
    if (dtype == DType::int8) {
      const Floats scale = hn::Set(d, half_at(scales, at / kQuantBlock));
      for (int64_t i = 0; i < kQuantBlock; i += lanes())
        hn::Store(hn::Mul(scale, widen_int8(line + at + i)), d, block + i);
    } else {
      for (int64_t part = 0; part < 16; part += lanes()) {
        const auto words = load_words(line + at / 2 + part * 4);
        for (int64_t k = 0; k < 8; ++k) {
          const Floats scale = hn::Set(d, half_at(scales, at / 32 + k / 2));
          hn::StoreU(hn::Mul(scale, widen_nibble(words, static_cast<int>(4 * k))), d, block + 16 * k + part);
        }
      }
    }
    std::memcpy(to + done, block, static_cast<size_t>(std::min(kQuantBlock, count - done)) * sizeof(float));
  }
}

void widen_line(const Weight& w, int64_t line, int64_t first, int64_t count, float* to) {
  const auto* bytes = static_cast<const std::byte*>(w.line(line));
  if (quantised(w.dtype)) return widen_quantised(bytes, w.dtype, w.line_length(), first, count, to);
  widen(bytes + first * dtype_size(w.dtype), w.dtype, count, to);
}

void narrow_bf16(const float* from, int64_t n, uint16_t* to) {
  const hn::ScalableTag<uint32_t> d32;
  const hn::RebindToFloat<decltype(d32)> df;
  const hn::Rebind<uint16_t, decltype(d32)> d16;
  const IntTag di;
  int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    const auto bits = hn::BitCast(d32, hn::LoadU(df, from + i));
    const auto high = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(high, hn::Set(d32, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff))));
    const auto magnitude = hn::BitCast(di, hn::And(bits, hn::Set(d32, 0x7fffffff)));
    const auto nan = hn::RebindMask(d32, hn::Gt(magnitude, hn::Set(di, 0x7f800000)));
    const auto quiet = hn::Or(high, hn::Set(d32, 0x40));
    // The halves go through int32: it is the narrowing that every target has. Values below 2^16 fit it after
    // the sign is spread, because the narrowing saturates signed numbers.
    const auto half = hn::BitCast(di, hn::ShiftLeft<16>(hn::IfThenElse(nan, quiet, rounded)));
    const hn::Rebind<int16_t, IntTag> d16s;
    hn::StoreU(hn::BitCast(d16, hn::DemoteTo(d16s, hn::ShiftRight<16>(half))), d16, to + i);
  }
  for (; i < n; ++i) to[i] = f32_to_bf16(from[i]);
}

void narrow_f16(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128  // Highway's plain conversion does not round to even
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  for (; i + lanes() <= n; i += lanes()) {
    hn::StoreU(hn::DemoteTo(d16, hn::LoadU(FloatTag(), from + i)), d16,
               reinterpret_cast<hwy::float16_t*>(to + i));
  }
#endif
  for (; i < n; ++i) to[i] = f32_to_f16(from[i]);
}

void narrow(const float* from, DType dtype, int64_t n, void* to) {
  if (dtype == DType::f32) {
    std::memmove(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::f16) {
    narrow_f16(from, n, static_cast<uint16_t*>(to));
  } else {
    narrow_bf16(from, n, static_cast<uint16_t*>(to));
  }
}

}  // namespace

void fill_embed(Kernels& kernels) {
  kernels.widen = widen;
  kernels.widen_line = widen_line;
  kernels.narrow = narrow;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_embed);
void fill_embed(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_embed)(kernels);
}
}  // namespace larosa
#endif
