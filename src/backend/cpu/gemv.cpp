// One row times a weight, bound by memory. Channels layout (chain-inl.h): several channels per pass over the
// outputs, whose accumulators stay in the cache; every output is two chains of multiply-adds over a
// ChannelList (kernels.h), each in its order, so threads may cut the outputs anywhere. Rows layout: dot
// products (rows-inl.h). Quantised lines are never widened in memory: their bytes are what it is asked for.
#define LAROSA_WITH_VNNI
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemv.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include "backend/cpu/chain-inl.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/reading-inl.h"
#include "backend/cpu/rows-inl.h"
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

void pack_input(const float* x, DType dtype, int64_t n, float* packed) {
  if (dtype == DType::int8) return round_row<DType::int8>(x, n, packed);
  if (dtype == DType::int4) return round_row<DType::int4>(x, n, packed);
  const FloatTag d;
  const int64_t size = padded_line(n), step = 2 * lanes();
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

/// Calls body(dot): dot.operator()<kRows>(j, apart, y) makes y of kRows rows j, j + apart, … of a weight of
/// any type against the packed x.
template <class Reading, class Body>
HWY_INLINE void with_rows(const Weight& weight, const float* packed, const Body& body) {
  const int64_t n = weight.in, line = weight.line_bytes();
  const auto levels = [&]<DType kType>() HWY_ATTR {
    const auto* const data = static_cast<const std::byte*>(weight.data);
    body([=]<int64_t kRows>(int64_t j, int64_t apart, float* y)
             HWY_ATTR { dot_levels<Reading, kType, kRows>(data + j * line, apart * line, n, packed, y); });
  };
  if (weight.dtype == DType::int8) return levels.template operator()<DType::int8>();
  if (weight.dtype == DType::int4) return levels.template operator()<DType::int4>();
  with_format(weight.dtype, [&](auto format) HWY_ATTR {
    using Format = decltype(format);
    const auto* const data = static_cast<const typename Format::Stored*>(weight.data);
    body([=]<int64_t kRows>(int64_t j, int64_t apart, float* y)
             HWY_ATTR { dot_rows<Reading, Format, kRows>(data + j * n, apart * n, n, packed, y); });
  });
}

template <class Reading>
void gemv_rows(const Weight& weight, const float* packed, int64_t begin, int64_t end, bool accumulate,
               float* y) {
  with_rows<Reading>(weight, packed, [&](const auto& dot) HWY_ATTR {
    // kRows runs of rows from `first` on, one row of each at a time. Returns the first row behind them.
    const auto runs = [&]<int64_t kRows>(int64_t first) HWY_ATTR {
      const int64_t length = (end - first) / kRows;
      for (int64_t j = first; j < first + length; ++j) {
        float v[kRows];
        dot.template operator()<kRows>(j, length, v);
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t at = j + r * length;
          if (weight.bias) v[r] += weight.bias[at];
          y[at] = accumulate ? v[r] + y[at] : v[r];
        }
      }
      return first + kRows * length;
    };
    runs.template operator()<1>(runs.template operator()<Reading::kRows>(begin));
  });
}

/// Rows are visited in order and each is one stream; the start of the next one is fetched meanwhile, since
/// the hardware does not follow from row to row.
void gemv_outputs(const Weight& weight, const float* packed, const int32_t* index, int64_t count, float* y) {
  const auto* const data = static_cast<const std::byte*>(weight.data);
  const int64_t line = weight.line_bytes();
  with_rows<AnyReading>(weight, packed, [&](const auto& dot) HWY_ATTR {
    constexpr int64_t kAhead = 1024;  // bytes
    const int64_t ahead = std::min(kAhead, line);
    for (int64_t c = 0; c < count; ++c) {
      if (c + 1 < count) {
        const std::byte* next = data + index[c + 1] * line;
        for (int64_t byte = 0; byte < ahead; byte += kLine) __builtin_prefetch(next + byte, 0, 2);
      }
      const int64_t j = index[c];
      float v = 0;
      dot.template operator()<1>(j, 0, &v);
      if (weight.bias) v += weight.bias[j];
      y[j] = v;
    }
  });
}

}  // namespace

void fill_gemv(Kernels& kernels) {
  kernels.gemv_chain = chain<AnyReading>;
  kernels.gemv_rows = gemv_rows<AnyReading>;
#if HWY_TARGET == HWY_AVX3_DL
  kernels.gemv_zen5 = {chain<Zen5Reading>, gemv_rows<Zen5Reading>};
  kernels.gemv_intel = {chain<IntelReading>, gemv_rows<IntelReading>};
#endif
  kernels.gemv_join = gemv_join;
  kernels.gemv_outputs = gemv_outputs;
  kernels.pack_input = pack_input;
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
