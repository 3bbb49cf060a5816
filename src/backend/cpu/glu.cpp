// Activations and a(gate) · up, element by element.
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

/// v above the threshold, else zero; a NaN stays.
HWY_INLINE Floats above(Floats v, Floats threshold) {
  return hn::IfThenZeroElse(hn::Le(v, threshold), v);
}

struct Silu {
  static HWY_INLINE Floats gate(Floats z, Floats) {
    return hn::Div(z, hn::Add(hn::Set(FloatTag(), 1.0f), exponential(hn::Neg(z))));
  }
  static HWY_INLINE Floats up(Floats u) { return u; }
};
struct Relu {
  static HWY_INLINE Floats gate(Floats z, Floats threshold) { return above(z, threshold); }
  static HWY_INLINE Floats up(Floats u) { return u; }
};
struct Relu2 {
  static HWY_INLINE Floats gate(Floats z, Floats threshold) {
    const Floats v = above(z, threshold);
    return hn::Mul(v, v);
  }
  static HWY_INLINE Floats up(Floats u) { return u; }
};
struct DRelu {
  static HWY_INLINE Floats gate(Floats z, Floats threshold) { return above(z, threshold); }
  static HWY_INLINE Floats up(Floats u) { return above(u, hn::Zero(FloatTag())); }
};

/// body(kind) for the activation's kind; its threshold is zero for all but relu.
template <class Body>
HWY_INLINE void with_kind(const Activation& activation, const Body& body) {
  switch (activation.kind) {
    case Activation::silu:
      return body(Silu());
    case Activation::relu:
      return body(Relu());
    case Activation::relu2:
      return body(Relu2());
    case Activation::drelu:
      return body(DRelu());
  }
}
float threshold_of(const Activation& a) {
  return a.kind == Activation::relu ? a.threshold : 0;
}

void activate(const float* z, const Activation& activation, int64_t n, float* y) {
  const FloatTag d;
  const Floats threshold = hn::Set(d, threshold_of(activation));
  with_kind(activation, [&](auto kind) HWY_ATTR {
    for (int64_t i = 0; i < n; i += lanes())
      store_part(decltype(kind)::gate(load_part(d, z + i, n - i), threshold), d, y + i, n - i);
  });
}

void glu(const float* gate, const float* up, const Activation& activation, int64_t n, float* mid) {
  const FloatTag d;
  const Floats threshold = hn::Set(d, threshold_of(activation));
  with_kind(activation, [&](auto kind) HWY_ATTR {
    using Kind = decltype(kind);
    for (int64_t i = 0; i < n; i += lanes()) {
      const Floats a = Kind::gate(load_part(d, gate + i, n - i), threshold);
      store_part(hn::Mul(a, Kind::up(load_part(d, up + i, n - i))), d, mid + i, n - i);
    }
  });
}

/// y = x with zeros where kept is not zero, or (inverted) where it is.
void mask(const float* kept, bool inverted, const float* x, int64_t n, float* y) {
  const FloatTag d;
  for (int64_t i = 0; i < n; i += lanes()) {
    const auto none = hn::Eq(load_part(d, kept + i, n - i), hn::Zero(d));
    const Floats v = load_part(d, x + i, n - i);
    store_part(inverted ? hn::IfThenZeroElse(none, v) : hn::IfThenElseZero(none, v), d, y + i, n - i);
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
  kernels.activate = activate;
  kernels.glu = glu;
  kernels.mask = mask;
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
