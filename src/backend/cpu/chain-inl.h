// One chain of channels (kernels.h) over a range of outputs: how its lines are read, and the arithmetic.
#if defined(LAROSA_CHAIN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_CHAIN_INL_H_
#undef LAROSA_CHAIN_INL_H_
#else
#define LAROSA_CHAIN_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "backend/cpu/kernels.h"
#include "backend/cpu/levels-inl.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

// How channels are read. The hardware cannot guess where a kept channel begins, so while some are multiplied
// what follows is fetched, one line per line. None of it changes a bit of a result.

/// Most machines. On Zen 4, one thread, bf16 8192 → 2048: 85 % of the read bandwidth without fetching, 97 %
/// so; fetching into the first level, which has few line buffers, is slower than not fetching. 4 or 16
/// channels side by side are slower than 8.
struct ReadMany {
  static constexpr int64_t kChannels = 8;       // side by side, 16 and 32 bits
  static constexpr int64_t kLevelChannels = 8;  // … 8 and 4 bits
  static constexpr int64_t kAhead = 8;       // of quantised lines: channels from those in work to the fetched
  static constexpr int64_t kAgain = 0;       // … and to those that are fetched once more
  static constexpr bool kInOrder = false;    // … and those that follow one another as one stream of lines
  static constexpr int kLevel = 2;           // of __builtin_prefetch: 2 second-level cache, 3 first
  static constexpr int64_t kOutputs = 4096;  // per pass; accumulators of 16 KiB
  // Whole lines are one stream each; cut into passes of 4096 outputs, 11008 → 4096 at 4 bits went from 19 to
  // 13 GB/s a thread, though the sums of 16384 outputs no longer fit into the first-level cache.
  static constexpr int64_t quantised_outputs(DType) { return 16384; }
  /// Bytes from what is multiplied of each of so many channels side by side to what is fetched; at most a
  /// line, as here.
  static constexpr int64_t near(int64_t /*channels*/) { return int64_t{1} << 40; }
  /// Whether channels that follow one another, lines of so many bytes, are read one at a time.
  static constexpr bool streams(int64_t /*line*/) { return false; }
};

/// Zen 5, whose fetches are dropped when they come faster than memory delivers, into the second-level cache
/// more often than into the first (48 KiB). So 16-bit lines are fetched late, some 6 KB before they are
/// multiplied, and into the first: half of the channels of 2048 to 14336 outputs come at 81 to 96 % of
/// the read bandwidth (50 GB/s; 79 to 91 % fetched a channel ahead). Channels that follow one another are one
/// stream, which the hardware follows too: lines of 4 and 8 KB one at a time at 98 to 100 % (six at a
/// time 87). Lines are whole: halves of 14336 outputs are 5 points slower, though sums no longer fit beside
/// them. Quantised lines, whose arithmetic is longer, gain nothing from late fetches; theirs come twice
/// (docs/results.md).
struct ReadFew {
  static constexpr int64_t kChannels = 6, kLevelChannels = 4, kAhead = 8, kAgain = 4;
  static constexpr bool kInOrder = true;
  static constexpr int kLevel = 3;
  static constexpr int64_t kOutputs = 16384;
  // 8192 outputs at 4 bits, half of the channels: with sums of 16 KiB 1.08 times as fast as with 32; at 8
  // bits whole lines, dense, 1.05 times.
  static constexpr int64_t quantised_outputs(DType t) { return t == DType::int4 ? 4096 : 16384; }
  static constexpr int64_t near(int64_t channels) { return channels == 1 ? 6144 : 1024; }
  static constexpr bool streams(int64_t line) { return line >= 4096 && line <= 8192; }
};

/// acc[j] += Σ_c value[c] · w_c[j], for one Pair of outputs per step, channels in order. Meanwhile what
/// follows is fetched, Reading::near further on: the rest of these lines, then those of `next`.
template <class Reading, class Format, int64_t Count>
HWY_INLINE void add_channels(const typename Format::Stored* const* w,
                             const typename Format::Stored* const* next, const float* value, int64_t n,
                             float* acc) {
  using Stored = typename Format::Stored;
  const FloatTag d;
  const int64_t step = 2 * lanes(), whole = n / step * step;
  const int64_t near = std::min(Reading::near(Count) / static_cast<int64_t>(sizeof(Stored)), whole);
  // Outputs [begin, end); of the lines `fetched` as many, from `from` on.
  const auto add = [&](int64_t begin, int64_t end, const Stored* const* fetched, int64_t from) HWY_ATTR {
    const Stored *now[Count], *ahead[Count];
    for (int64_t c = 0; c < Count; ++c) now[c] = w[c] + begin;
    for (int64_t c = 0; c < Count; ++c) ahead[c] = fetched[c] + from;
    float* const sums = acc + begin;
    for (int64_t j = 0; j < end - begin; j += step) {
      Floats a = hn::Load(d, sums + j), b = hn::Load(d, sums + j + lanes());
      for (int64_t c = 0; c < Count; ++c) {
        __builtin_prefetch(ahead[c] + j, 0, Reading::kLevel);
        const Pair p = Format::load(now[c] + j);
        const Floats x = hn::Set(d, value[c]);
        a = hn::MulAdd(x, p.a, a);
        b = hn::MulAdd(x, p.b, b);
      }
      hn::Store(a, d, sums + j);
      hn::Store(b, d, sums + j + lanes());
    }
  };
  add(0, whole - near, w, near);
  add(whole - near, whole, next, 0);
  if (whole == n) return;
  Floats a = hn::Load(d, acc + whole), b = hn::Load(d, acc + whole + lanes());
  for (int64_t c = 0; c < Count; ++c) {
    const Pair p = load_tail<Format>(w[c] + whole, n - whole);
    const Floats x = hn::Set(d, value[c]);
    a = hn::MulAdd(x, p.a, a);
    b = hn::MulAdd(x, p.b, b);
  }
  hn::Store(a, d, acc + whole);
  hn::Store(b, d, acc + whole + lanes());
}

template <class Reading, class Format>
void chain_as(const Weight& weight, const int32_t* index, const float* value, int64_t count, int64_t begin,
              int64_t end, float* part) {
  using Stored = typename Format::Stored;
  const auto* w = static_cast<const Stored*>(weight.data);
  constexpr int64_t kOutputs = Reading::kOutputs, kChannels = Reading::kChannels;
  const int64_t passes = (end - begin + kOutputs - 1) / kOutputs;
  const int64_t width = passes > 0 ? ((end - begin + passes - 1) / passes + 63) / 64 * 64 : 0;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t n = std::min(width, end - first);
    float* acc = part + (first - begin);
    std::fill_n(acc, (n + 2 * lanes() - 1) / (2 * lanes()) * 2 * lanes(), 0.0f);
    const Stored *row[kChannels + 1], *next[kChannels];
    const auto channel = [&](int64_t c) { return w + index[std::min(c, count - 1)] * weight.out + first; };
    const bool stream = n == weight.out && Reading::streams(n * static_cast<int64_t>(sizeof(Stored)));
    int64_t c = 0;
    for (; c + kChannels <= count; c += kChannels) {
      for (int64_t s = 0; s <= kChannels; ++s) row[s] = channel(c + s);
      if (stream && index[c + kChannels - 1] - index[c] == kChannels - 1) {
        for (int64_t s = 0; s < kChannels; ++s)
          add_channels<Reading, Format, 1>(row + s, row + s + 1, value + c + s, n, acc);
        continue;
      }
      for (int64_t s = 0; s < kChannels; ++s) next[s] = channel(c + kChannels + s);
      add_channels<Reading, Format, kChannels>(row, next, value + c, n, acc);
    }
    for (; c < count; ++c) {
      row[0] = channel(c);
      row[1] = channel(c + 1);
      add_channels<Reading, Format, 1>(row, row + 1, value + c, n, acc);
    }
  }
}

/// One pass of quantised channels over outputs [first, first + 128 · blocks).
template <class Reading, class Format>
class QuantisedPass {
 public:
  static constexpr int64_t kMostOutputs = Reading::quantised_outputs(Format::kType);

  QuantisedPass(const Weight& weight, int64_t first, int64_t blocks, float* part)
      : base_(static_cast<const std::byte*>(weight.data)),
        bytes_(weight.line_bytes()),
        levels_at_(first / kQuantBlock * Format::kBytes),
        scales_at_(scales_offset(Format::kType, weight.out) + first / kQuantBlock * Format::kGroups * 2),
        blocks_(blocks),
        groups_(blocks * Format::kGroups),
        whole_(blocks * kQuantBlock >= weight.out),
        part_(part) {}

  void run(const int32_t* index, const float* value, int64_t count) {
    std::fill_n(part_, blocks_ * kQuantBlock, 0.0f);
    int64_t begin = 0, end = block_end(index, 0, count);
    fetch_scales(index, end);
    while (begin < count) {
      const int64_t next = block_end(index, end, count);
      prepare(index + begin, value + begin, end - begin);
      for (int64_t c = begin, scales = end; c < end; c += kChannels) {
        const int64_t more = c + kChannels < end ? std::min(scales + kChannels, next) : next;
        fetch_scales(index + scales, more - scales);
        scales = more;
        multiply(index, c, std::min(kChannels, end - c), c - begin, count);
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

  static constexpr int64_t kLine = 64;  // bytes of a cache line
  static constexpr int64_t kChannels = Reading::kLevelChannels;

  /// Where the levels of the pass stand, of the channels in work and of those to fetch.
  struct Lines {
    const std::byte *now[kChannels + 1], *ahead[kChannels], *again[kChannels];
    int64_t stride = 1;  // of the blocks fetched ahead: kChannels where these lines follow one another
  };

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

  /// sums += levels · multipliers of channels [at, at + n), n ≤ kChannels, the first of them the block's
  /// channel `first`; later ones of the `count` are fetched meanwhile.
  void multiply(const int32_t* index, int64_t at, int64_t n, int64_t first, int64_t count) {
    Lines lines;
    const auto levels = [&](int64_t c) { return line(index[std::min(c, count - 1)]) + levels_at_; };
    for (int64_t c = 0; c < n; ++c) lines.now[c] = levels(at + c);
    lines.now[n] = lines.now[n - 1];  // the partner of an odd channel, times zero
    for (int64_t c = 0; c < kChannels; ++c) {
      lines.ahead[c] = levels(at + Reading::kAhead + c);
      lines.again[c] = levels(at + Reading::kAgain + c);
    }
    const bool in_order = whole_ && lines.ahead[kChannels - 1] - lines.ahead[0] == (kChannels - 1) * bytes_;
    if (Reading::kInOrder && in_order) {  // with the scales between; the end is left to `again`
      for (int64_t c = 1; c < kChannels; ++c) lines.ahead[c] = lines.ahead[0] + c * Format::kBytes;
      lines.stride = kChannels;
    }
    // Straight code: with a loop int8 and int4 took 1.11 and 1.12 times as long (AVX2, in cache), sparse int8
    // 1.1 times (Zen 5).
    const int64_t pairs = (n + 1) / 2;
    if constexpr (kChannels > 4) {
      if (pairs == 4) return add_blocks(lines, Count<4>(), first / 2);
      if (pairs == 3) return add_blocks(lines, Count<3>(), first / 2);
    }
    if (pairs == 2) return add_blocks(lines, Count<2>(), first / 2);
    add_blocks(lines, Count<1>(), first / 2);
  }

  template <int64_t kCount>
  using Count = std::integral_constant<int64_t, kCount>;

  template <class Pairs>
  void add_blocks(const Lines& lines, Pairs pairs, int64_t first) {
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t at = b * Format::kBytes, g = b * Format::kGroups;
      for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
        const bool begins = part == 0, ends = part + 8 * lanes() == kQuantBlock;
        Sums s = Sums::load(sums_ + b * kQuantBlock + part);
        for (int64_t c = 0; c < pairs; ++c) {
          if (begins) fetch(lines, 2 * c, at);
          if (ends) fetch(lines, 2 * c + 1, at);
          Format::add_pair(lines.now[2 * c] + at, lines.now[2 * c + 1] + at, part, pairs_[first + c] + g, s);
          s.pin();
        }
        for (int64_t c = 2 * pairs; c < kChannels && begins; ++c) fetch(lines, c, at);
        s.store(sums_ + b * kQuantBlock + part);
      }
    }
  }

  /// Once per block and channel in work: a block of the line ahead, and of the one that is fetched again.
  static HWY_INLINE void fetch(const Lines& lines, int64_t c, int64_t at) {
    fetch(lines.ahead[c] + at * (Reading::kInOrder ? lines.stride : 1));
    if (Reading::kAgain > 0) fetch(lines.again[c] + at);
  }

  /// A block of a line. Called between the products, as evenly as they come: a burst of 16 would wait for the
  /// 24 misses that a core may have open.
  static HWY_INLINE void fetch(const std::byte* levels) {
    __builtin_prefetch(levels, 0, Reading::kLevel);
    if constexpr (Format::kBytes > kLine) __builtin_prefetch(levels + kLine, 0, Reading::kLevel);
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
        __builtin_prefetch(line(index[c]) + scales_at_ + byte, 0, Reading::kLevel);
    }
  }

  static constexpr int64_t kMostGroups = kMostOutputs / kQuantBlock * Format::kGroups;
  static constexpr int64_t kPadded = kMostGroups + 16;
  const std::byte* base_;
  const int64_t bytes_, levels_at_, scales_at_, blocks_, groups_;
  const bool whole_;  // the pass takes whole lines
  float* const part_;
  HWY_ALIGN int32_t sums_[kMostOutputs];
  HWY_ALIGN float factor_[kPadded];
  HWY_ALIGN uint32_t start_[kPadded];
  HWY_ALIGN uint32_t pairs_[kChainBlock / 2][kPadded];
};

template <class Reading, class Format>
void chain_quantised(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                     int64_t end, float* part) {
  const int64_t blocks = (end - begin + kQuantBlock - 1) / kQuantBlock;
  constexpr int64_t kMost = QuantisedPass<Reading, Format>::kMostOutputs / kQuantBlock;
  const int64_t passes = (blocks + kMost - 1) / kMost;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = blocks * pass / passes, last = blocks * (pass + 1) / passes;
    QuantisedPass<Reading, Format>(w, begin + first * kQuantBlock, last - first, part + first * kQuantBlock)
        .run(index, value, count);
  }
}

template <class Reading>
void chain(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
           int64_t end, float* part) {
  if (w.dtype == DType::int8) return chain_quantised<Reading, Int8>(w, index, value, count, begin, end, part);
  if (w.dtype == DType::int4) return chain_quantised<Reading, Int4>(w, index, value, count, begin, end, part);
  with_format(w.dtype, [&](auto format) HWY_ATTR {
    chain_as<Reading, decltype(format)>(w, index, value, count, begin, end, part);
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#endif
