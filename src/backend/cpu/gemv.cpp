// One row times a weight, bound by memory. Channels layout: several channels per pass over the outputs, whose
// accumulators stay in the first-level cache; every output is one chain of multiply-adds in channel order, so
// that leaving out a zero channel changes no bit and threads may cut the outputs anywhere. Rows layout: dot
// products.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemv.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

constexpr int64_t kChannels = 8;    // weight streams read side by side
constexpr int64_t kOutputs = 4096;  // accumulators per pass: 16 KiB

/// acc[j] += Σ_c value[c] · w_c[j], for one Pair of outputs per step, channels in order.
template <class Format, int64_t Count>
HWY_INLINE void add_channels(const typename Format::Stored* const* w, const float* value, int64_t n,
                             float* acc) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    Floats a = hn::Load(d, acc + j), b = hn::Load(d, acc + j + lanes());
    for (int64_t c = 0; c < Count; ++c) {
      const Pair p = Format::load(w[c] + j);
      const Floats x = hn::Set(d, value[c]);
      a = hn::MulAdd(x, p.a, a);
      b = hn::MulAdd(x, p.b, b);
    }
    hn::Store(a, d, acc + j);
    hn::Store(b, d, acc + j + lanes());
  }
  if (j == n) return;
  Floats a = hn::Load(d, acc + j), b = hn::Load(d, acc + j + lanes());
  for (int64_t c = 0; c < Count; ++c) {
    const Pair p = load_tail<Format>(w[c] + j, n - j);
    const Floats x = hn::Set(d, value[c]);
    a = hn::MulAdd(x, p.a, a);
    b = hn::MulAdd(x, p.b, b);
  }
  hn::Store(a, d, acc + j);
  hn::Store(b, d, acc + j + lanes());
}

/// y = acc (+ bias) (+ y), acc in Pair order.
template <class Format>
HWY_INLINE void finish(const float* acc, const float* bias, bool accumulate, int64_t n, float* y) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  HWY_ALIGN float ordered[2 * hn::MaxLanes(FloatTag())];
  for (int64_t j = 0; j < n; j += step) {
    const float* from = acc + j;
    if (Format::kEvenOdd) {
      hn::StoreInterleaved2(hn::Load(d, acc + j), hn::Load(d, acc + j + lanes()), d, ordered);
      from = ordered;
    }
    for (int64_t part = 0; part < step && j + part < n; part += lanes()) {
      const int64_t at = j + part, left = n - at;
      Floats v = hn::Load(d, from + part);
      if (bias) v = hn::Add(v, load_part(d, bias + at, left));
      if (accumulate) v = hn::Add(v, load_part(d, y + at, left));
      store_part(v, d, y + at, left);
    }
  }
}

template <class Format>
void channels_as(const Weight& weight, const int32_t* index, const float* value, int64_t count, int64_t begin,
                 int64_t end, bool accumulate, float* y) {
  using Stored = typename Format::Stored;
  const auto* w = static_cast<const Stored*>(weight.data);
  HWY_ALIGN float acc[kOutputs + 2 * hn::MaxLanes(FloatTag())];
  const int64_t passes = (end - begin + kOutputs - 1) / kOutputs;
  const int64_t width = passes > 0 ? ((end - begin + passes - 1) / passes + 63) / 64 * 64 : 0;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t n = std::min(width, end - first);
    std::fill_n(acc, (n + 2 * lanes() - 1) / (2 * lanes()) * 2 * lanes(), 0.0f);
    const Stored* row[kChannels];
    const auto channel = [&](int64_t c) { return w + (index ? index[c] : c) * weight.out + first; };
    int64_t c = 0;
    for (; c + kChannels <= count; c += kChannels) {
      for (int64_t s = 0; s < kChannels; ++s) row[s] = channel(c + s);
      add_channels<Format, kChannels>(row, value + c, n, acc);
    }
    for (; c < count; ++c) {
      row[0] = channel(c);
      add_channels<Format, 1>(row, value + c, n, acc);
    }
    finish<Format>(acc, weight.bias ? weight.bias + first : nullptr, accumulate, n, y + first);
  }
}

void gemv_channels(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                   int64_t end, bool accumulate, float* y) {
  with_format(w.dtype, [&](auto format) HWY_ATTR {
    channels_as<decltype(format)>(w, index, value, count, begin, end, accumulate, y);
  });
}

int64_t packed_size(int64_t n) {
  return (n + 2 * lanes() - 1) / (2 * lanes()) * 2 * lanes();
}

void pack_input(const float* x, DType dtype, int64_t n, float* packed) {
  const FloatTag d;
  const int64_t size = packed_size(n), step = 2 * lanes();
  std::copy_n(x, n, packed);
  std::fill(packed + n, packed + size, 0.0f);
  if (dtype != DType::bf16) return;
  for (int64_t i = 0; i < size; i += step) {
    Floats even, odd;
    hn::LoadInterleaved2(d, packed + i, even, odd);
    hn::StoreU(even, d, packed + i);
    hn::StoreU(odd, d, packed + i + lanes());
  }
}

/// Count rows against x; every row has its own two accumulators, so the grouping changes no bit.
template <class Format, int64_t Count>
HWY_INLINE void dot_rows(const typename Format::Stored* w, int64_t n, const float* x, float* out) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  Floats a[Count], b[Count];
  for (int64_t r = 0; r < Count; ++r) a[r] = b[r] = hn::Zero(d);
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    const Floats u = hn::LoadU(d, x + i), v = hn::LoadU(d, x + i + lanes());
    for (int64_t r = 0; r < Count; ++r) {
      const Pair p = Format::load(w + r * n + i);
      a[r] = hn::MulAdd(u, p.a, a[r]);
      b[r] = hn::MulAdd(v, p.b, b[r]);
    }
  }
  if (i < n) {
    const Floats u = hn::LoadU(d, x + i), v = hn::LoadU(d, x + i + lanes());
    for (int64_t r = 0; r < Count; ++r) {
      const Pair p = load_tail<Format>(w + r * n + i, n - i);
      a[r] = hn::MulAdd(u, p.a, a[r]);
      b[r] = hn::MulAdd(v, p.b, b[r]);
    }
  }
  for (int64_t r = 0; r < Count; ++r) out[r] = hn::GetLane(hn::SumOfLanes(d, hn::Add(a[r], b[r])));
}

void gemv_rows(const Weight& weight, const float* packed, int64_t begin, int64_t end, bool accumulate,
               float* y) {
  with_format(weight.dtype, [&](auto format) HWY_ATTR {
    using Format = decltype(format);
    const auto* w = static_cast<const typename Format::Stored*>(weight.data);
    constexpr int64_t kRows = 4;
    float dot[kRows];
    for (int64_t j = begin; j < end;) {
      const int64_t count = end - j >= kRows ? kRows : 1;
      if (count == kRows) {
        dot_rows<Format, kRows>(w + j * weight.in, weight.in, packed, dot);
      } else {
        dot_rows<Format, 1>(w + j * weight.in, weight.in, packed, dot);
      }
      for (int64_t r = 0; r < count; ++r, ++j) {
        float v = dot[r];
        if (weight.bias) v += weight.bias[j];
        y[j] = accumulate ? v + y[j] : v;
      }
    }
  });
}

}  // namespace

void fill_gemv(Kernels& kernels) {
  kernels.gemv_channels = gemv_channels;
  kernels.gemv_rows = gemv_rows;
  kernels.pack_input = pack_input;
  kernels.packed_size = packed_size;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_gemv);
void fill_gemv(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_gemv)(kernels);
}
}  // namespace larosa
#endif
