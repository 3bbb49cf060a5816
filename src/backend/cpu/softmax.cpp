// Log-probabilities of one row.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/softmax.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <cmath>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

void log_softmax(int64_t n, float* x) {
  const FloatTag d;
  Floats best = hn::Set(d, x[0]);
  int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) best = hn::Max(best, hn::LoadU(d, x + i));
  float top = hn::GetLane(hn::MaxOfLanes(d, best));
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;

  const Floats shift = hn::Set(d, top);
  double sum = 0;
  for (int64_t block = 0; block < n; block += 1024) {
    const int64_t end = HWY_MIN(n, block + 1024);
    Floats part = hn::Zero(d);
    for (i = block; i + lanes() <= end; i += lanes()) {
      part = hn::Add(part, exponential(hn::Sub(hn::LoadU(d, x + i), shift)));
    }
    sum += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, part)));
    for (; i < end; ++i) sum += std::exp(static_cast<double>(x[i]) - top);
  }
  // x − top first: it is small where it matters, so log Σ is not drowned by a large top.
  const Floats total = hn::Set(d, static_cast<float>(std::log(sum)));
  for (i = 0; i < n; i += lanes()) {
    store_part(hn::Sub(hn::Sub(load_part(d, x + i, n - i), shift), total), d, x + i, n - i);
  }
}

}  // namespace

void fill_softmax(Kernels& kernels) {
  kernels.log_softmax = log_softmax;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_softmax);
void fill_softmax(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_softmax)(kernels);
}
}  // namespace larosa
#endif
