// SiLU(gate) · up, element by element.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/glu.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

void glu(const float* gate, const float* up, int64_t n, float* mid) {
  const FloatTag d;
  for (int64_t i = 0; i < n; i += lanes()) {
    const Floats z = load_part(d, gate + i, n - i), u = load_part(d, up + i, n - i);
    const Floats one = hn::Set(d, 1.0f);
    const Floats silu = hn::Div(z, hn::Add(one, exponential(hn::Neg(z))));
    store_part(hn::Mul(silu, u), d, mid + i, n - i);
  }
}

void add(const float* addend, int64_t n, float* y) {
  const FloatTag d;
  for (int64_t i = 0; i < n; i += lanes()) {
    store_part(hn::Add(load_part(d, y + i, n - i), load_part(d, addend + i, n - i)), d, y + i, n - i);
  }
}

}  // namespace

void fill_glu(Kernels& kernels) {
  kernels.glu = glu;
  kernels.add = add;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_glu);
void fill_glu(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_glu)(kernels);
}
}  // namespace larosa
#endif
