// Attention of one query head over stored keys and values, and the softmax step of blocked attention. Both
// keep a running maximum and sum (arXiv 1805.02867), so scores of a long context are never held at once.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attend.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
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

template <class Stored>
void attend_as(const float* q, const Stored* keys, const Stored* values, int64_t n, int64_t width,
               float* score, float* max, float* sum, float* out) {
  const FloatTag d;
  const float unit = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t j = 0; j < n; ++j) {
    Floats a = hn::Zero(d);
    for (int64_t e = 0; e < width; e += lanes()) {
      a = hn::MulAdd(load_part(d, q + e, width - e), load_stored(keys + j * width + e, width - e), a);
    }
    score[j] = hn::GetLane(hn::SumOfLanes(d, a)) * unit;
  }
  const float factor = soften(score, n, 0, n, max, sum);
  for (int64_t e = 0; e < width; e += 4 * lanes()) {
    Floats a[4];
    const int64_t left = width - e, count = HWY_MIN(int64_t{4}, (left + lanes() - 1) / lanes());
    for (int64_t s = 0; s < count; ++s) {
      a[s] = hn::Mul(load_part(d, out + e + s * lanes(), left - s * lanes()), hn::Set(d, factor));
    }
    for (int64_t j = 0; j < n; ++j) {
      const Floats p = hn::Set(d, score[j]);
      for (int64_t s = 0; s < count; ++s) {
        const Floats v = load_stored(values + j * width + e + s * lanes(), left - s * lanes());
        a[s] = hn::MulAdd(p, v, a[s]);
      }
    }
    for (int64_t s = 0; s < count; ++s) store_part(a[s], d, out + e + s * lanes(), left - s * lanes());
  }
}

void attend_one(const float* q, const void* keys, const void* values, DType dtype, int64_t n, int64_t width,
                float* score, float* max, float* sum, float* out) {
  if (dtype == DType::f32) {
    attend_as(q, static_cast<const float*>(keys), static_cast<const float*>(values), n, width, score, max,
              sum, out);
  } else {
    using Half = uint16_t;
    attend_as(q, static_cast<const Half*>(keys), static_cast<const Half*>(values), n, width, score, max, sum,
              out);
  }
}

}  // namespace

void fill_attend(Kernels& kernels) {
  kernels.attend_one = attend_one;
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
