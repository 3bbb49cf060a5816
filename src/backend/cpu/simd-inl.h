// The vocabulary of the kernels: float32 vectors with tails, stored weights as vectors, e^x.
#if defined(LAROSA_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_SIMD_INL_H_
#undef LAROSA_SIMD_INL_H_
#else
#define LAROSA_SIMD_INL_H_
#endif

#include <cstring>

#include "base/quant.h"
#include "base/types.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::ScalableTag<int32_t>;
using Floats = hn::Vec<FloatTag>;
using Ints = hn::Vec<IntTag>;

HWY_INLINE int64_t lanes() {
  return static_cast<int64_t>(hn::Lanes(FloatTag()));
}

// Loads and stores of some 32-bit lanes: SSE and NEON have none. Highway's would touch all lanes there.
#undef LAROSA_MASKED_MEMORY
#if HWY_MEM_OPS_MIGHT_FAULT && HWY_TARGET != HWY_AVX2
#define LAROSA_MASKED_MEMORY 0
#else
#define LAROSA_MASKED_MEMORY 1
#endif

/// The first `left` (or all) lanes at p; the others are zero and their memory is not touched, not even
/// written back as it was: it may be another thread's.
template <class Tag, class T>
HWY_INLINE hn::Vec<Tag> load_part(Tag d, const T* p, int64_t left) {
  if (left >= lanes()) return hn::LoadU(d, p);
#if LAROSA_MASKED_MEMORY
  return hn::MaskedLoad(hn::FirstN(d, static_cast<size_t>(left)), d, p);
#else
  HWY_ALIGN T part[hn::MaxLanes(Tag())] = {};
  std::memcpy(part, p, static_cast<size_t>(left) * sizeof(T));
  return hn::Load(d, part);
#endif
}
template <class Tag, class T>
HWY_INLINE void store_part(hn::Vec<Tag> v, Tag d, T* p, int64_t left) {
  if (left >= lanes()) return hn::StoreU(v, d, p);
#if LAROSA_MASKED_MEMORY
  hn::BlendedStore(v, hn::FirstN(d, static_cast<size_t>(left)), d, p);
#else
  HWY_ALIGN T part[hn::MaxLanes(Tag())];
  hn::Store(v, d, part);
  std::memcpy(p, part, static_cast<size_t>(left) * sizeof(T));
#endif
}

/// One vector of binary16.
HWY_INLINE Floats widen_half(const uint16_t* p) {
  const FloatTag d;
#if HWY_TARGET == HWY_SCALAR || \
    HWY_TARGET == HWY_EMU128  // Highway's plain conversion knows no infinity or NaN
  HWY_ALIGN float wide[hn::MaxLanes(FloatTag())];
  for (int64_t i = 0; i < lanes(); ++i) wide[i] = f16_to_f32(p[i]);
  return hn::Load(d, wide);
#else
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
#endif
}

/// Two vectors of weights that lie together in memory. For bf16 `a` holds the even and `b` the odd ones: one
/// shift and one mask widen them, where widening in order costs two shuffles. Callers keep their other
/// operand in the same order.
struct Pair {
  Floats a, b;
};

struct F32 {
  static constexpr DType kType = DType::f32;
  using Stored = float;
  static HWY_INLINE Pair load(const float* p) {
    const FloatTag d;
    return {hn::LoadU(d, p), hn::LoadU(d, p + lanes())};
  }
};

struct F16 {
  static constexpr DType kType = DType::f16;
  using Stored = uint16_t;
  static HWY_INLINE Pair load(const uint16_t* p) { return {widen_half(p), widen_half(p + lanes())}; }
};

struct BF16 {
  static constexpr DType kType = DType::bf16;
  using Stored = uint16_t;
  static HWY_INLINE Pair load(const uint16_t* p) {
    const FloatTag d;
    const hn::ScalableTag<uint32_t> d32;
#if HWY_TARGET == HWY_SCALAR  // loads no vector of bytes
    uint32_t word;
    std::memcpy(&word, p, sizeof(word));
    const auto both = hn::Set(d32, word);
#else
    const hn::ScalableTag<uint8_t> d8;
    const auto both = hn::BitCast(d32, hn::LoadU(d8, reinterpret_cast<const uint8_t*>(p)));
#endif
    return {hn::BitCast(d, hn::ShiftLeft<16>(both)),
            hn::BitCast(d, hn::And(both, hn::Set(d32, 0xffff0000u)))};
  }
};

/// Fewer than a Pair's worth of weights, padded with zeros.
template <class Format>
HWY_INLINE Pair load_tail(const typename Format::Stored* p, int64_t left) {
  HWY_ALIGN typename Format::Stored padded[2 * hn::MaxLanes(FloatTag())] = {};
  std::memcpy(padded, p, static_cast<size_t>(left) * sizeof(padded[0]));
  return Format::load(padded);
}

// Quantised lines (base/quant.h). Bytes are loaded by memcpy-like moves: files align nothing.

/// Scale `i` of an array of f16.
HWY_INLINE float half_at(const std::byte* scales, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * i, sizeof(bits));
  return f16_to_f32(bits);
}
/// One vector of f16 that stand anywhere.
HWY_INLINE Floats load_halves(const std::byte* p) {
#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
  HWY_ALIGN uint16_t half[hn::MaxLanes(FloatTag())];
  std::memcpy(half, p, sizeof(half));
  return widen_half(half);
#else
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  const hn::Repartition<uint8_t, decltype(d16)> d8;
  return hn::PromoteTo(FloatTag(), hn::BitCast(d16, hn::LoadU(d8, reinterpret_cast<const uint8_t*>(p))));
#endif
}
/// One vector of int8 levels.
HWY_INLINE Floats widen_int8(const std::byte* p) {
  const hn::Rebind<int8_t, FloatTag> d8;
  return hn::ConvertTo(FloatTag(),
                       hn::PromoteTo(IntTag(), hn::LoadU(d8, reinterpret_cast<const int8_t*>(p))));
}
/// One vector of words, each with eight nibbles.
using WordTag = hn::ScalableTag<uint32_t>;
HWY_INLINE hn::Vec<WordTag> load_words(const std::byte* p) {
  const WordTag d32;
#if HWY_TARGET == HWY_SCALAR  // loads no vector of bytes
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return hn::Set(d32, word);
#else
  const hn::ScalableTag<uint8_t> d8;
  auto words = hn::BitCast(d32, hn::LoadU(d8, reinterpret_cast<const uint8_t*>(p)));
#if HWY_TARGET <= HWY_AVX3 && HWY_COMPILER_GCC  // else GCC loads the words again for each of eight shifts
  asm("" : "+v"(words.raw));
#endif
  return words;
#endif
}
/// The levels q in [−8, 7] that stand `shift` bits up in each word.
HWY_INLINE Floats widen_nibble(hn::Vec<WordTag> words, int shift) {
  const WordTag d32;
  const IntTag di;
  const auto level = hn::BitCast(di, hn::And(hn::ShiftRightSame(words, shift), hn::Set(d32, 15)));
  return hn::ConvertTo(FloatTag(), hn::Sub(level, hn::Set(di, 8)));
}

/// Calls body(Format()) for a plain element type.
template <class Body>
HWY_INLINE void with_format(DType dtype, const Body& body) {
  if (dtype == DType::f32) {
    body(F32());
  } else if (dtype == DType::f16) {
    body(F16());
  } else {
    body(BF16());
  }
}

/// e^x to 1.2e-7 relative; 0 below −104, infinity above 88.8. Cody-Waite reduction to |r| ≤ ln 2 / 2, a
/// Taylor polynomial of degree 7 (remainder 5e-9), then the exponent in two factors so that neither overflows
/// alone.
HWY_INLINE Floats exponential(Floats x) {
  const FloatTag d;
  const IntTag di;
  x = hn::Max(hn::Min(x, hn::Set(d, 89.0f)), hn::Set(d, -105.0f));
  const Ints n = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504f)));
  const Floats nf = hn::ConvertTo(d, n);
  Floats r = hn::NegMulAdd(nf, hn::Set(d, 0.693145752f), x);
  r = hn::NegMulAdd(nf, hn::Set(d, 1.42860677e-6f), r);
  Floats p = hn::Set(d, 1.98412698e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.38888889e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.33333333e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.16666667e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.66666667e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5f));
  p = hn::MulAdd(p, hn::Mul(r, r), r);
  p = hn::Add(p, hn::Set(d, 1.0f));
  const Ints half = hn::ShiftRight<1>(n);
  const Ints bias = hn::Set(di, 127);
  const Floats s = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(half, bias)));
  const Floats t = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::Sub(n, half), bias)));
  return hn::Mul(hn::Mul(p, s), t);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#endif
