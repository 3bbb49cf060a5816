// One row times a weight, bound by memory. Channels layout: several channels per pass over the outputs, whose
// accumulators stay in the first-level cache; every output is one chain of multiply-adds per ChannelList, in
// its order, so that leaving out a zero channel changes no bit and threads may cut the outputs anywhere. Rows
// layout: dot products. Quantised lines are widened in registers: their bytes are what memory is asked for.
#define LAROSA_WITH_VNNI
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemv.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <algorithm>
#include <type_traits>
#include "backend/cpu/kernels.h"
#include "backend/cpu/levels-inl.h"
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

// Of a pass. Whole lines are one stream each; cut into passes of 4096 outputs, 11008 → 4096 at 4 bits went
// from 19 to 13 GB/s a thread, though the sums of 16384 outputs no longer fit into the first-level cache.
constexpr int64_t kMostOutputs = 16384;

/// One pass of quantised channels over outputs [first, first + 128 · blocks).
template <class Format>
class QuantisedPass {
 public:
  QuantisedPass(const Weight& weight, int64_t first, int64_t blocks, float* part)
      : base_(static_cast<const std::byte*>(weight.data)),
        bytes_(weight.line_bytes()),
        levels_at_(first / kQuantBlock * Format::kBytes),
        scales_at_(scales_offset(Format::kType, weight.out) + first / kQuantBlock * Format::kGroups * 2),
        blocks_(blocks),
        groups_(blocks * Format::kGroups),
        part_(part) {}

  void run(const int32_t* index, const float* value, int64_t count) {
    std::fill_n(part_, blocks_ * kQuantBlock, 0.0f);
    int64_t begin = 0, end = block_end(index, 0, count);
    fetch_scales(index, end);
    while (begin < count) {
      const int64_t next = block_end(index, end, count);
      prepare(index + begin, value + begin, end - begin);
      for (int64_t c = begin, scales = end; c < end; c += kChannels) {
        const int64_t ahead = std::min(c + kChannels, count);
        const int64_t more = c + kChannels < end ? std::min(scales + kChannels, next) : next;
        fetch_scales(index + scales, more - scales);
        scales = more;
        multiply(index + c, std::min(kChannels, end - c), c - begin, index + ahead,
                 std::min(kChannels, count - ahead));
      }
      finish();
      begin = end;
      end = next;
    }
  }

 private:
  /// End of the run of kept channels that starts at `begin` and lies in one block of channels.
  static int64_t block_end(const int32_t* index, int64_t begin, int64_t count) {
    if (begin >= count) return begin;
    const int64_t limit = (index[begin] / kChainBlock + 1) * kChainBlock;
    int64_t end = begin + 1;
    while (end < count && index[end] < limit) ++end;
    return end;
  }

  HWY_INLINE const std::byte* line(int32_t channel) const { return base_ + channel * bytes_; }

  /// Multipliers of `count` channels as pairs of 16-bit numbers, the factor that makes numbers of them again,
  /// and the sums that take the offset of the levels off.
  void prepare(const int32_t* index, const float* value, int64_t count) {
    const FloatTag d;
    const IntTag di;
    const Ints magnitude = hn::Set(di, 0x7fffffff);
    const Words ones = hn::Set(WordTag(), 0x00010001u);
    HWY_ALIGN float wide[kChainBlock][hn::MaxLanes(FloatTag())];
    const std::byte* at[kChainBlock];
    for (int64_t c = 0; c < count; ++c) at[c] = line(index[c]) + scales_at_;
    for (int64_t g = 0; g < groups_; g += lanes()) {
      // Bits of magnitudes order like these, infinity and NaN above all others.
      Ints top = hn::Zero(di);
      for (int64_t c = 0; c < count; ++c) {
        const Floats p = hn::Mul(scales(at[c], g), hn::Set(d, value[c]));
        hn::Store(p, d, wide[c]);
        top = hn::Max(top, hn::And(hn::BitCast(di, p), magnitude));
      }
      const Floats largest = hn::BitCast(d, top);
      const Floats poison = hn::Mul(largest, hn::Zero(d));  // NaN where a number is NaN or infinite
      hn::Store(hn::Add(hn::Mul(largest, hn::Set(d, 1 / kMostMultiplier)), poison), d, factor_ + g);
      // Below 2^-100 nothing is left of a sum that anybody could see; above it the quotient is finite.
      const auto seen = hn::Gt(largest, hn::Set(d, 0x1p-100f));
      const Floats inverse = hn::IfThenElseZero(seen, hn::Div(hn::Set(d, kMostMultiplier), largest));
      // Added to 1.5 · 2^23, a number is rounded to an integer that stands in the lower half.
      const auto rounded = [&](const float* p) HWY_ATTR {
        return hn::BitCast(WordTag(), hn::Add(hn::Mul(hn::Load(d, p), inverse), hn::Set(d, 0x1.8p23f)));
      };
      Ints sum = hn::Zero(di);
      for (int64_t c = 0; c < count; c += 2) {
        const Words b = c + 1 < count ? rounded(wide[c + 1]) : hn::Zero(WordTag());
        const Words pair = Format::arrange(low_halves(rounded(wide[c]), b));
        sum = dot_pairs(pair, ones, sum);
        hn::Store(pair, WordTag(), pairs_[c / 2] + g);
      }
      hn::Store(hn::BitCast(WordTag(), hn::Mul(sum, hn::Set(di, -Format::kOffset))), WordTag(), start_ + g);
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t place = 0; place < kQuantBlock; place += lanes()) {
        const Words start = Format::spread(start_ + b * Format::kGroups, place);
        hn::Store(hn::Mul(hn::BitCast(di, start), hn::Set(di, Format::offsets(place))), di,
                  sums_ + b * kQuantBlock + place);
      }
    }
  }

  HWY_INLINE Floats scales(const std::byte* line, int64_t g) const {
    const std::byte* from = line + 2 * g;
    if (g + lanes() <= groups_) return load_halves(from);
    HWY_ALIGN uint16_t half[hn::MaxLanes(FloatTag())] = {};
    std::memcpy(half, from, static_cast<size_t>(groups_ - g) * 2);
    return widen_half(half);
  }

  /// sums += levels · multipliers of up to kChannels channels, from the block's channel `first` on; `next`
  /// are fetched meanwhile (see add_channels).
  void multiply(const int32_t* index, int64_t count, int64_t first, const int32_t* next, int64_t next_count) {
    const std::byte *now[kChannels + 1], *ahead[kChannels];
    for (int64_t c = 0; c < count; ++c) now[c] = line(index[c]) + levels_at_;
    now[count] = now[count - 1];             // the partner of an odd channel, times zero
    for (int64_t c = 0; c < kChannels; ++c)  // none left: once more what is here
      ahead[c] = next_count > 0 ? line(next[std::min(c, next_count - 1)]) + levels_at_ : now[0];
    const int64_t pairs = (count + 1) / 2;
#if HWY_TARGET == \
    HWY_AVX2  // straight code: with a loop int8 and int4 took 1.11 and 1.12 times as long (in cache)
    if (pairs == 4) return add_blocks(now, ahead, Count<4>(), first / 2);
    if (pairs == 3) return add_blocks(now, ahead, Count<3>(), first / 2);
    if (pairs == 2) return add_blocks(now, ahead, Count<2>(), first / 2);
    add_blocks(now, ahead, Count<1>(), first / 2);
#else
    add_blocks(now, ahead, pairs, first / 2);
#endif
  }

  template <int64_t kCount>
  using Count = std::integral_constant<int64_t, kCount>;

  /// `pairs`: a number or a Count.
  template <class Pairs>
  void add_blocks(const std::byte* const* now, const std::byte* const* ahead, Pairs pairs, int64_t first) {
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t at = b * Format::kBytes, g = b * Format::kGroups;
      for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
        const bool begins = part == 0, ends = part + 8 * lanes() == kQuantBlock;
        Sums s = Sums::load(sums_ + b * kQuantBlock + part);
        HWY_UNROLL(4)
        for (int64_t c = 0; c < pairs; ++c) {
          if (begins) fetch(ahead[2 * c] + at);
          if (ends) fetch(ahead[2 * c + 1] + at);
          Format::add_pair(now[2 * c] + at, now[2 * c + 1] + at, part, pairs_[first + c] + g, s);
          s.pin();
        }
        for (int64_t c = 2 * pairs; c < kChannels && begins; ++c) fetch(ahead[c] + at);
        s.store(sums_ + b * kQuantBlock + part);
      }
    }
  }

  /// A block of a line. Called between the products, as evenly as they come: a burst of 16 would wait for the
  /// 24 misses that a core may have open.
  static HWY_INLINE void fetch(const std::byte* levels) {
    __builtin_prefetch(levels, 0, 2);
    if constexpr (Format::kBytes > kLine) __builtin_prefetch(levels + kLine, 0, 2);
  }

  /// part += factor · sums.
  void finish() {
    const FloatTag d;
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
        Format::separate(Sums::load(sums_ + b * kQuantBlock + part)).each([&](int64_t k, Ints sum) HWY_ATTR {
          const int64_t place = part + k * lanes();
          const Floats factor = hn::Set(d, factor_[b * Format::kGroups + Format::group(place)]);
          float* to = part_ + b * kQuantBlock + Format::output(place);
          hn::Store(hn::MulAdd(hn::ConvertTo(d, sum), factor, hn::Load(d, to)), d, to);
        });
      }
    }
  }

  void fetch_scales(const int32_t* index, int64_t count) const {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t byte = 0; byte < groups_ * 2; byte += kLine)
        __builtin_prefetch(line(index[c]) + scales_at_ + byte, 0, 2);
    }
  }

  static constexpr int64_t kLine = 64;  // bytes of a cache line
  static constexpr int64_t kMostGroups = kMostOutputs / kQuantBlock * Format::kGroups;
  static constexpr int64_t kPadded = kMostGroups + 16;
  const std::byte* base_;
  const int64_t bytes_, levels_at_, scales_at_, blocks_, groups_;
  float* const part_;
  HWY_ALIGN int32_t sums_[kMostOutputs];
  HWY_ALIGN float factor_[kPadded];
  HWY_ALIGN uint32_t start_[kPadded];
  HWY_ALIGN uint32_t pairs_[kChainBlock / 2][kPadded];
};

template <class Format>
void chain_quantised(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                     int64_t end, float* part) {
  const int64_t blocks = (end - begin + kQuantBlock - 1) / kQuantBlock;
  constexpr int64_t kMost = kMostOutputs / kQuantBlock;
  const int64_t passes = (blocks + kMost - 1) / kMost;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = blocks * pass / passes, last = blocks * (pass + 1) / passes;
    QuantisedPass<Format>(w, begin + first * kQuantBlock, last - first, part + first * kQuantBlock)
        .run(index, value, count);
  }
}

void gemv_chain(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                int64_t end, float* part) {
  if (w.dtype == DType::int8) return chain_quantised<Int8>(w, index, value, count, begin, end, part);
  if (w.dtype == DType::int4) return chain_quantised<Int4>(w, index, value, count, begin, end, part);
  with_format(w.dtype, [&](auto format) HWY_ATTR {
    chain_as<decltype(format)>(w, index, value, count, begin, end, part);
  });
}

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
  kernels.gemv_chain = gemv_chain;
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
