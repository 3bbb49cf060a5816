// One row times a weight, bound by memory. Channels layout (chain-inl.h): several channels per pass over the
// outputs, whose accumulators stay in the first-level cache; every output is one chain of multiply-adds per
// ChannelList, in its order, so that leaving out a zero channel changes no bit and threads may cut the
// outputs anywhere. Rows layout: dot products. Quantised lines are widened in registers: their bytes are what
// memory is asked for.
#define LAROSA_WITH_VNNI
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemv.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include "backend/cpu/chain-inl.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

/// How the outputs of a part follow one another: kWays vectors interleaved (bf16: a Pair; int8: the bytes of
/// a word, unless the format has put them in order).
template <int kWays>
HWY_INLINE void join_as(const float* even, const float* odd, const float* bias, bool accumulate, int64_t n,
                        float* y) {
  const FloatTag d;
  const int64_t step = kWays * lanes();
  HWY_ALIGN float ordered[4 * hn::MaxLanes(FloatTag())];
  const auto sum = [&](int64_t at)
                       HWY_ATTR { return hn::Add(hn::Load(d, even + at), hn::Load(d, odd + at)); };
  for (int64_t j = 0; j < n; j += step) {
    if constexpr (kWays == 1) hn::Store(sum(j), d, ordered);
    if constexpr (kWays == 2) hn::StoreInterleaved2(sum(j), sum(j + lanes()), d, ordered);
    if constexpr (kWays == 4)
      hn::StoreInterleaved4(sum(j), sum(j + lanes()), sum(j + 2 * lanes()), sum(j + 3 * lanes()), d, ordered);
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
  const float* bias = w.bias ? w.bias + begin : nullptr;
  const auto join = w.dtype == DType::bf16   ? join_as<2>
                    : w.dtype == DType::int8 ? join_as<Int8::kWays>
                                             : join_as<1>;
  join(even, odd, bias, accumulate, end - begin, y + begin);
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

/// Rows are visited in order and each is one stream; the start of the next one is fetched meanwhile, since
/// the hardware does not follow from row to row.
void gemv_outputs(const Weight& weight, const float* packed, const int32_t* index, const float* value,
                  int64_t count, float* y) {
  with_format(weight.dtype, [&](auto format) HWY_ATTR {
    using Format = decltype(format);
    const auto* w = static_cast<const typename Format::Stored*>(weight.data);
    constexpr int64_t kAhead = 1024, kLine = 64;  // bytes
    const int64_t ahead = std::min(kAhead, weight.line_bytes());
    for (int64_t c = 0; c < count; ++c) {
      if (c + 1 < count) {
        const auto* next = reinterpret_cast<const std::byte*>(w + index[c + 1] * weight.in);
        for (int64_t byte = 0; byte < ahead; byte += kLine) __builtin_prefetch(next + byte, 0, 2);
      }
      const int64_t j = index[c];
      if (value[c] == 0) continue;
      float v = dot_row<Format>(w + j * weight.in, weight.in, packed);
      if (weight.bias) v += weight.bias[j];
      y[j] = v;
    }
  });
}

}  // namespace

void fill_gemv(Kernels& kernels) {
  kernels.gemv_chain = chain<ReadMany>;
#if HWY_TARGET == HWY_AVX3_DL
  kernels.gemv_chain_zen5 = chain<ReadFew>;
#else
  kernels.gemv_chain_zen5 = chain<ReadMany>;
#endif
  kernels.gemv_join = gemv_join;
  kernels.gemv_rows = gemv_rows;
  kernels.gemv_outputs = gemv_outputs;
  kernels.pack_input = pack_input;
  kernels.packed_size = packed_size;
  kernels.target = hwy::TargetName(HWY_TARGET);
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
