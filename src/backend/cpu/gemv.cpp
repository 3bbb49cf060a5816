// One row times a weight, bound by memory. Channels layout: several channels per pass over the outputs, whose
// accumulators stay in the first-level cache; every output is one chain of multiply-adds per ChannelList, in
// its order, so that leaving out a zero channel changes no bit and threads may cut the outputs anywhere. Rows
// layout: dot products.
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

/// acc[j] += Σ_c value[c] · w_c[j], for one Pair of outputs per step, channels in order. Meanwhile `next`,
/// the channels of the following call, are fetched into the second-level cache: the hardware cannot guess
/// where a kept channel begins. On Zen 4, one thread, bf16 8192 → 2048: 85 % of the read bandwidth without,
/// 97 % so; fetching into the first level, which has few line buffers, is slower than not fetching. 4 or 16
/// channels side by side are slower than 8.
template <class Format, int64_t Count>
HWY_INLINE void add_channels(const typename Format::Stored* const* w,
                             const typename Format::Stored* const* next, const float* value, int64_t n,
                             float* acc) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    Floats a = hn::Load(d, acc + j), b = hn::Load(d, acc + j + lanes());
    for (int64_t c = 0; c < Count; ++c) {
      __builtin_prefetch(next[c] + j, 0, 2);
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

template <class Format>
void chain_as(const Weight& weight, const int32_t* index, const float* value, int64_t count, int64_t begin,
              int64_t end, float* part) {
  using Stored = typename Format::Stored;
  const auto* w = static_cast<const Stored*>(weight.data);
  const int64_t passes = (end - begin + kOutputs - 1) / kOutputs;
  const int64_t width = passes > 0 ? ((end - begin + passes - 1) / passes + 63) / 64 * 64 : 0;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t n = std::min(width, end - first);
    float* acc = part + (first - begin);
    std::fill_n(acc, (n + 2 * lanes() - 1) / (2 * lanes()) * 2 * lanes(), 0.0f);
    const Stored *row[kChannels], *next[kChannels];
    const auto channel = [&](int64_t c) { return w + index[c] * weight.out + first; };
    int64_t c = 0;
    for (int64_t s = 0; s < kChannels && s < count; ++s) next[s] = channel(s);
    for (; c + kChannels <= count; c += kChannels) {
      for (int64_t s = 0; s < kChannels; ++s) row[s] = next[s];
      for (int64_t s = 0; s < kChannels; ++s) next[s] = channel(std::min(c + kChannels + s, count - 1));
      add_channels<Format, kChannels>(row, next, value + c, n, acc);
    }
    for (; c < count; ++c) {
      row[0] = channel(c);
      add_channels<Format, 1>(row, row, value + c, n, acc);
    }
  }
}

void gemv_chain(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                int64_t end, float* part) {
  with_format(w.dtype, [&](auto format) HWY_ATTR {
    chain_as<decltype(format)>(w, index, value, count, begin, end, part);
  });
}

/// Parts are in Pair order.
template <class Format>
HWY_INLINE void join_as(const float* even, const float* odd, const float* bias, bool accumulate, int64_t n,
                        float* y) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  HWY_ALIGN float ordered[2 * hn::MaxLanes(FloatTag())];
  for (int64_t j = 0; j < n; j += step) {
    const Floats a = hn::Add(hn::Load(d, even + j), hn::Load(d, odd + j));
    const Floats b = hn::Add(hn::Load(d, even + j + lanes()), hn::Load(d, odd + j + lanes()));
    if (Format::kEvenOdd) {
      hn::StoreInterleaved2(a, b, d, ordered);
    } else {
      hn::Store(a, d, ordered);
      hn::Store(b, d, ordered + lanes());
    }
    for (int64_t part = 0; part < step && j + part < n; part += lanes()) {
      const int64_t at = j + part, left = n - at;
      Floats v = hn::Load(d, ordered + part);
      if (bias) v = hn::Add(v, load_part(d, bias + at, left));
      if (accumulate) v = hn::Add(v, load_part(d, y + at, left));
      store_part(v, d, y + at, left);
    }
  }
}

void gemv_join(const Weight& w, const float* even, const float* odd, int64_t begin, int64_t end,
               bool accumulate, float* y) {
  with_format(w.dtype, [&](auto format) HWY_ATTR {
    join_as<decltype(format)>(even, odd, w.bias ? w.bias + begin : nullptr, accumulate, end - begin,
                              y + begin);
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

/// One row against x. Row after row is one stream of memory: 99 % of the read bandwidth, where four rows side
/// by side reach 70 %. Two steps at a time keep four multiply-adds in flight.
template <class Format>
HWY_INLINE float dot_row(const typename Format::Stored* w, int64_t n, const float* x) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  Floats a = hn::Zero(d), b = hn::Zero(d), c = hn::Zero(d), e = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) {
    const Pair p = Format::load(w + i), q = Format::load(w + i + step);
    a = hn::MulAdd(hn::LoadU(d, x + i), p.a, a);
    b = hn::MulAdd(hn::LoadU(d, x + i + lanes()), p.b, b);
    c = hn::MulAdd(hn::LoadU(d, x + i + step), q.a, c);
    e = hn::MulAdd(hn::LoadU(d, x + i + step + lanes()), q.b, e);
  }
  for (; i < n; i += step) {
    const Pair p = i + step <= n ? Format::load(w + i) : load_tail<Format>(w + i, n - i);
    a = hn::MulAdd(hn::LoadU(d, x + i), p.a, a);
    b = hn::MulAdd(hn::LoadU(d, x + i + lanes()), p.b, b);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

void gemv_rows(const Weight& weight, const float* packed, int64_t begin, int64_t end, bool accumulate,
               float* y) {
  with_format(weight.dtype, [&](auto format) HWY_ATTR {
    using Format = decltype(format);
    const auto* w = static_cast<const typename Format::Stored*>(weight.data);
    for (int64_t j = begin; j < end; ++j) {
      float v = dot_row<Format>(w + j * weight.in, weight.in, packed);
      if (weight.bias) v += weight.bias[j];
      y[j] = accumulate ? v + y[j] : v;
    }
  });
}

}  // namespace

void fill_gemv(Kernels& kernels) {
  kernels.gemv_chain = gemv_chain;
  kernels.gemv_join = gemv_join;
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
