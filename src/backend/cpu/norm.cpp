// RMSNorm of one row.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/norm.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <cmath>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y) {
  const FloatTag d;
  // Partial sums of 1024 entries in float32, together in float64: the error does not grow with the row.
  double sum = 0;
  for (int64_t block = 0; block < n; block += 1024) {
    const int64_t end = HWY_MIN(n, block + 1024);
    Floats a = hn::Zero(d), b = hn::Zero(d);
    int64_t i = block;
    for (; i + 2 * lanes() <= end; i += 2 * lanes()) {
      const Floats u = hn::LoadU(d, x + i), v = hn::LoadU(d, x + i + lanes());
      a = hn::MulAdd(u, u, a);
      b = hn::MulAdd(v, v, b);
    }
    for (; i < end; i += lanes()) {
      const Floats u = load_part(d, x + i, end - i);
      a = hn::MulAdd(u, u, a);
    }
    sum += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b))));
  }
  const Floats factor = hn::Set(d, static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n) + eps)));
  for (int64_t i = 0; i < n; i += lanes()) {
    Floats v = hn::Mul(load_part(d, x + i, n - i), factor);
    if (gain) v = hn::Mul(v, load_part(d, gain + i, n - i));
    store_part(v, d, y + i, n - i);
  }
}

}  // namespace

void fill_norm(Kernels& kernels) {
  kernels.rms_norm = rms_norm;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_norm);
void fill_norm(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_norm)(kernels);
}
}  // namespace larosa
#endif
