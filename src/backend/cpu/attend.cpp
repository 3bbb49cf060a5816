// Attention of one query head over stored keys and values, and the softmax step of blocked attention. Both
// keep a running maximum and sum (arXiv 1805.02867), so scores of a long context are never held at once.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attend.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

void scale(float factor, int64_t n, float* x) {
  const FloatTag d;
  const Floats f = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += lanes())
    store_part(hn::Mul(load_part(d, x + i, n - i), f), d, x + i, n - i);
}

float soften(float* score, int64_t n, int64_t begin, int64_t end, float* max, float* sum) {
  const FloatTag d;
  Floats best = hn::Set(d, *max);
  int64_t i = begin;
  for (; i + lanes() <= end; i += lanes()) best = hn::Max(best, hn::LoadU(d, score + i));
  float top = hn::GetLane(hn::MaxOfLanes(d, best));
  for (; i < end; ++i) top = score[i] > top ? score[i] : top;
  const float factor = *max == top ? 1.0f : std::exp(*max - top);

  const Floats shift = hn::Set(d, top);
  Floats total = hn::Zero(d);
  for (i = 0; i < begin; ++i) score[i] = 0;
  for (i = begin; i < end; i += lanes()) {
    const int64_t left = end - i;
    Floats p = exponential(hn::Sub(load_part(d, score + i, left), shift));
    if (left < lanes()) p = hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(left)), p);
    store_part(p, d, score + i, left);
    total = hn::Add(total, p);
  }
  for (i = end; i < n; ++i) score[i] = 0;
  *sum = *sum * factor + hn::GetLane(hn::SumOfLanes(d, total));
  *max = top;
  return factor;
}

/// Stored keys and values as float32, tails included.
HWY_INLINE Floats load_stored(const float* p, int64_t left) {
  return load_part(FloatTag(), p, left);
}
HWY_INLINE Floats load_stored(const uint16_t* p, int64_t left) {
  if (left >= lanes()) return widen_half(p);
  HWY_ALIGN uint16_t padded[hn::MaxLanes(FloatTag())] = {};
  std::memcpy(padded, p, static_cast<size_t>(left) * sizeof(padded[0]));
  return widen_half(padded);
}

/// Levels only: the scale of a position is taken up by its score.
HWY_INLINE Floats load_stored(const int8_t* p, int64_t left) {
  if (left >= lanes()) return widen_int8(reinterpret_cast<const std::byte*>(p));
  HWY_ALIGN int8_t padded[hn::MaxLanes(FloatTag())] = {};
  std::memcpy(padded, p, static_cast<size_t>(left));
  return widen_int8(reinterpret_cast<const std::byte*>(padded));
}

/// score[h][j] = unit · q[h]·k[j] for Count heads: a key is widened once for all of them. With int8 times
/// scale[j].
template <int64_t Count, class Stored>
void score_heads(const float* q, const Stored* keys, const float* scale, int64_t n, int64_t width, float unit,
                 float* score) {
  const FloatTag d;
  for (int64_t j = 0; j < n; ++j) {
    Floats a[Count];
    for (int64_t h = 0; h < Count; ++h) a[h] = hn::Zero(d);
    for (int64_t e = 0; e < width; e += lanes()) {
      const Floats k = load_stored(keys + j * width + e, width - e);
      for (int64_t h = 0; h < Count; ++h)
        a[h] = hn::MulAdd(load_part(d, q + h * width + e, width - e), k, a[h]);
    }
    const float factor = scale ? unit * scale[j] : unit;
    for (int64_t h = 0; h < Count; ++h)
      score[h * kAttendStride + j] = hn::GetLane(hn::SumOfLanes(d, a[h])) * factor;
  }
}

/// out[h] = factor[h] · out[h] + Σ_j score[h][j] · v[j] for Count heads, two vectors of the width at a time.
template <int64_t Count, class Stored>
void mix_heads(const float* score, const Stored* values, int64_t n, int64_t width, const float* factor,
               float* out, int64_t stride) {
  const FloatTag d;
  for (int64_t e = 0; e < width; e += 2 * lanes()) {
    const int64_t left = width - e, right = left - lanes();
    const bool two = right > 0;
    Floats a[Count], b[Count];
    for (int64_t h = 0; h < Count; ++h) {
      const Floats f = hn::Set(d, factor[h]);
      a[h] = hn::Mul(load_part(d, out + h * stride + e, left), f);
      b[h] = two ? hn::Mul(load_part(d, out + h * stride + e + lanes(), right), f) : hn::Zero(d);
    }
    for (int64_t j = 0; j < n; ++j) {
      const Stored* v = values + j * width + e;
      const Floats u = load_stored(v, left), w = two ? load_stored(v + lanes(), right) : hn::Zero(d);
      for (int64_t h = 0; h < Count; ++h) {
        const Floats p = hn::Set(d, score[h * kAttendStride + j]);
        a[h] = hn::MulAdd(p, u, a[h]);
        b[h] = hn::MulAdd(p, w, b[h]);
      }
    }
    for (int64_t h = 0; h < Count; ++h) {
      store_part(a[h], d, out + h * stride + e, left);
      if (two) store_part(b[h], d, out + h * stride + e + lanes(), right);
    }
  }
}

/// x *= factor, element by element.
void multiply(const float* factor, int64_t n, float* x) {
  const FloatTag d;
  for (int64_t i = 0; i < n; i += lanes())
    store_part(hn::Mul(load_part(d, x + i, n - i), load_part(d, factor + i, n - i)), d, x + i, n - i);
}

template <int64_t Count, class Stored>
void attend_heads(const float* q, StoredHead keys, StoredHead values, int64_t n, int64_t width, float* score,
                  float* state, int64_t stride) {
  const float unit = 1.0f / std::sqrt(static_cast<float>(width));
  score_heads<Count>(q, static_cast<const Stored*>(keys.data), keys.scale, n, width, unit, score);
  float factor[Count];
  for (int64_t h = 0; h < Count; ++h) {
    factor[h] = soften(score + h * kAttendStride, n, 0, n, state + h * stride, state + h * stride + 1);
    if (values.scale) multiply(values.scale, n, score + h * kAttendStride);
  }
  mix_heads<Count>(score, static_cast<const Stored*>(values.data), n, width, factor, state + 2, stride);
}

template <class Stored>
void attend_as(const float* q, StoredHead keys, StoredHead values, int64_t n, int64_t width, int64_t heads,
               float* score, float* state, int64_t stride) {
  int64_t h = 0;
  for (; h + kAttendHeads <= heads; h += kAttendHeads) {
    attend_heads<kAttendHeads, Stored>(q + h * width, keys, values, n, width, score, state + h * stride,
                                       stride);
  }
  for (; h < heads; ++h)
    attend_heads<1, Stored>(q + h * width, keys, values, n, width, score, state + h * stride, stride);
}

void attend_group(const float* q, StoredHead keys, StoredHead values, DType dtype, int64_t n, int64_t width,
                  int64_t heads, float* score, float* state, int64_t stride) {
  const auto attend = dtype == DType::f32   ? attend_as<float>
                      : dtype == DType::f16 ? attend_as<uint16_t>
                                            : attend_as<int8_t>;
  attend(q, keys, values, n, width, heads, score, state, stride);
}

float quantise_head(const float* x, int64_t n, int8_t* levels) {
  const FloatTag d;
  const IntTag di;
  const hn::Rebind<int8_t, IntTag> d8;
  Ints bits = hn::Zero(di);  // of |x|: integers order like them and let no NaN slip through
  for (int64_t i = 0; i < n; i += lanes())
    bits = hn::Max(bits, hn::BitCast(di, hn::Abs(load_part(d, x + i, n - i))));
  const float most = std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(di, bits)));
  if (!(most >= 0x1p-100f) || most > std::numeric_limits<float>::max()) {
    std::fill_n(levels, n, int8_t{0});
    return most < 0x1p-100f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const Floats inverse = hn::Set(d, 127 / most);
  HWY_ALIGN int8_t part[hn::MaxLanes(FloatTag())];
  for (int64_t i = 0; i < n; i += lanes()) {
    const Ints q = hn::NearestInt(hn::Mul(load_part(d, x + i, n - i), inverse));
    hn::StoreU(hn::DemoteTo(d8, q), d8, part);
    std::memcpy(levels + i, part, static_cast<size_t>(HWY_MIN(lanes(), n - i)));
  }
  return most / 127;
}

void widen_heads(StoredHead from, int64_t n, int64_t width, float* to) {
  const FloatTag d;
  const auto* levels = static_cast<const int8_t*>(from.data);
  for (int64_t j = 0; j < n; ++j) {
    const Floats scale = hn::Set(d, from.scale[j]);
    for (int64_t e = 0; e < width; e += lanes()) {
      const Floats q = load_stored(levels + j * width + e, width - e);
      store_part(hn::Mul(scale, q), d, to + j * width + e, width - e);
    }
  }
}

}  // namespace

void fill_attend(Kernels& kernels) {
  kernels.attend_group = attend_group;
  kernels.quantise_head = quantise_head;
  kernels.widen_heads = widen_heads;
  kernels.soften = soften;
  kernels.scale = scale;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_attend);
void fill_attend(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_attend)(kernels);
}
}  // namespace larosa
#endif
