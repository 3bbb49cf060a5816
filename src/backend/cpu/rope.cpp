// Rotary position embedding of one head.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/rope.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

void rope(const float* cosine, const float* sine, int64_t half, float* head) {
  const FloatTag d;
  for (int64_t i = 0; i < half; i += lanes()) {
    const int64_t left = half - i;
    const Floats c = load_part(d, cosine + i, left), s = load_part(d, sine + i, left);
    const Floats a = load_part(d, head + i, left), b = load_part(d, head + half + i, left);
    store_part(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, head + i, left);
    store_part(hn::MulAdd(a, s, hn::Mul(b, c)), d, head + half + i, left);
  }
}

}  // namespace

void fill_rope(Kernels& kernels) {
  kernels.rope = rope;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_rope);
void fill_rope(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_rope)(kernels);
}
}  // namespace larosa
#endif
