// One chain of channels (kernels.h) over a range of outputs: how its lines are read, and the arithmetic.
#if defined(LAROSA_CHAIN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_CHAIN_INL_H_
#undef LAROSA_CHAIN_INL_H_
#else
#define LAROSA_CHAIN_INL_H_
#endif

#include <algorithm>

#include "backend/cpu/kernels.h"
#include "backend/cpu/levels-inl.h"
#include "backend/cpu/reading-inl.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

/// acc[j] += Σ_c value[c] · w_c[j], for one Pair of outputs per step, channels in order. Meanwhile what
/// follows is fetched, Reading::near further on (or ahead, of one channel): the rest of these lines, then
/// those of `next`.
template <class Reading, class Format, int64_t Count>
HWY_INLINE void add_channels(const typename Format::Stored* const* w,
                             const typename Format::Stored* const* next, const float* value, int64_t n,
                             float* acc) {
  using Stored = typename Format::Stored;
  const FloatTag d;
  const int64_t step = 2 * lanes(), whole = n / step * step;
  constexpr int64_t kNear = Count == 1 ? Reading::ahead(Format::kType) : Reading::near(Format::kType);
  const int64_t near = std::min(kNear / static_cast<int64_t>(sizeof(Stored)), whole);
  // Outputs [begin, end); of the lines `fetched` as many, from `from` on.
  const auto add = [&](int64_t begin, int64_t end, const Stored* const* fetched, int64_t from) HWY_ATTR {
    const Stored *now[Count], *ahead[Count];
    for (int64_t c = 0; c < Count; ++c) now[c] = w[c] + begin;
    for (int64_t c = 0; c < Count; ++c) ahead[c] = fetched[c] + from;
    float* const sums = acc + begin;
    for (int64_t j = 0; j < end - begin; j += step) {
      Floats a = hn::Load(d, sums + j), b = hn::Load(d, sums + j + lanes());
      for (int64_t c = 0; c < Count; ++c) {
        const Pair p = Format::load(now[c] + j);
        const Floats x = hn::Set(d, value[c]);
        a = hn::MulAdd(x, p.a, a);
        b = hn::MulAdd(x, p.b, b);
        Reading::hold(a, b);
        Reading::fetch(ahead[c] + j);
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
    const bool stream =
        n == weight.out && Reading::streams(Format::kType, n * static_cast<int64_t>(sizeof(Stored)));
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
        follow_((Reading::ahead(Format::kType) + bytes_ - 1) / bytes_),
        streams_(blocks * kQuantBlock >= weight.out && Reading::streams(Format::kType, bytes_)),
        part_(part) {}

  void run(const int32_t* index, const float* value, int64_t count) {
    std::fill_n(part_, blocks_ * kQuantBlock, 0.0f);
    int64_t begin = 0, end = std::min(kChannelBlock, count);
    fetch_scales(index, end);
    if constexpr (Reading::kDeals) deal(index, end, index_);
    while (begin < count) {
      const int64_t next = std::min(end + kChannelBlock, count), n = end - begin;
      Kept kept = {index + begin, value + begin, count - begin, index + begin, count - begin};
      if constexpr (Reading::kDeals) {
        deal(value + begin, n, value_);
        deal(index + end, next - end, index_ + n);
        kept.index = index_;
        kept.value = value_;
        kept.count = next - begin;
      }
      prepare(kept, n);
      for (int64_t c = 0, scales = end; c < n; c += kChannels) {
        const int64_t more = c + kChannels < n ? std::min(scales + kChannels, next) : next;
        fetch_scales(index + scales, more - scales);
        scales = more;
        multiply(kept, c, std::min(kChannels, n - c));
      }
      finish();
      if constexpr (Reading::kDeals) std::copy_n(index_ + n, next - end, index_);
      begin = end;
      end = next;
    }
  }

 private:
  static constexpr int64_t kChannels = Reading::level_channels(Format::kType);
  static constexpr bool kTwice = Reading::twice(Format::kType);

  /// Of a block's channels from[0, n) the place k side by side gets the k-th run: to[k + kChannels · i] is
  /// its i-th. What is left, fewer than kChannels, comes last.
  template <class T>
  static void deal(const T* from, int64_t n, T* to) {
    const int64_t run = n / kChannels;
    for (int64_t k = 0; k < kChannels; ++k)
      for (int64_t i = 0; i < run; ++i) to[i * kChannels + k] = from[k * run + i];
    std::copy(from + kChannels * run, from + n, to + kChannels * run);
  }

  /// The channels of a block as they are multiplied and, behind them, what comes next; dealt out as far as
  /// the next block's end, and from there on as `all` has it.
  struct Kept {
    const int32_t* index;
    const float* value;
    int64_t count;
    const int32_t* all;
    int64_t left;
  };

  /// Where the levels of the pass stand: of the channels in work, and kChannels and twice as many further on,
  /// of which as many are fetched as are in work.
  struct Lines {
    const std::byte *now[kChannels], *next[kChannels], *after[kChannels];
  };

  HWY_INLINE const std::byte* line(int32_t channel) const { return base_ + channel * bytes_; }

  /// Multipliers of the block's `count` channels as pairs of 16-bit numbers, the factor that makes numbers of
  /// them again, and the sums that take the offset of the levels off.
  void prepare(const Kept& kept, int64_t count) {
    const FloatTag d;
    const IntTag di;
    const Ints magnitude = hn::Set(di, 0x7fffffff);
    const Words ones = hn::Set(WordTag(), 0x00010001u);
    HWY_ALIGN float wide[kChannelBlock][hn::MaxLanes(FloatTag())];
    const std::byte* at[kChannelBlock];
    for (int64_t c = 0; c < count; ++c) at[c] = line(kept.index[c]) + scales_at_;
    for (int64_t g = 0; g < groups_; g += lanes()) {
      // Bits of magnitudes order like these, infinity and NaN above all others.
      Ints top = hn::Zero(di);
      for (int64_t c = 0; c < count; ++c) {
        const Floats p = hn::Mul(scales(at[c], g), hn::Set(d, kept.value[c]));
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
        hn::Store(pair, WordTag(), pairs_ + c / 2 * kPadded + g);
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
    // Behind a line's scales is padding.
    if (scales_at_ + 2 * (g + lanes()) <= bytes_) return load_halves(from);
    HWY_ALIGN uint16_t half[hn::MaxLanes(FloatTag())] = {};
    std::memcpy(half, from, static_cast<size_t>(groups_ - g) * 2);
    return widen_half(half);
  }

  /// sums += levels · multipliers of the block's channels [at, at + n), n ≤ kChannels; later ones are fetched
  /// meanwhile.
  void multiply(const Kept& kept, int64_t at, int64_t n) {
    Lines lines;
    const auto levels = [&](int64_t c) {
      return line(c < kept.count ? kept.index[c] : kept.all[std::min(c, kept.left - 1)]) + levels_at_;
    };
    // The partner of an odd channel is the channel itself, times zero.
    for (int64_t c = 0; c < kChannels; ++c) lines.now[c] = levels(at + std::min(c, n - 1));
    for (int64_t c = 0; c < kChannels; ++c) lines.next[c] = levels(at + kChannels + c);
    for (int64_t c = 0; kTwice && c < kChannels; ++c) lines.after[c] = levels(at + 2 * kChannels + c);
    // A stream begins where 8 more channels follow than it fetches: what side_by_side left of these lines is
    // never fetched (with 4 more, 8-bit lines of 4 KB took 1.07 times as long at a keep of 0.9).
    const int64_t last = at + kChannels + follow_ + (in_stream_ ? 0 : 8) - 1;
    in_stream_ =
        streams_ && n == kChannels && last < kept.count && kept.index[last] - kept.index[at] == last - at;
    if (in_stream_) return stream(lines, at);
    // Straight code: with a loop int8 and int4 took 1.11 and 1.12 times as long (AVX2, in cache), sparse int8
    // 1.1 times (Zen 5).
    const int64_t pairs = (n + 1) / 2;
    if constexpr (kChannels > 4) {
      if (pairs == 4) return side_by_side<4>(lines, at);
      if (pairs == 3) return side_by_side<3>(lines, at);
    }
    if (pairs == 2) return side_by_side<2>(lines, at);
    side_by_side<1>(lines, at);
  }

  /// Channels that follow one another, in pairs: as they lie, scales between, two blocks are fetched for two
  /// that are multiplied; at 4 bits that leaves one cache line of nine to the hardware.
  void stream(const Lines& lines, int64_t first) {
    const int64_t far = follow_ * bytes_;
    const int64_t block = bytes_ / blocks_;
    for (int64_t c = 0; c < kChannels; c += 2) {
      const std::byte* ahead[2] = {lines.now[c] + far, lines.now[c] + far + block};
      add_blocks<1, false>(lines.now + c, ahead, 2 * block, nullptr, 0, blocks_, first + c);
    }
  }

  /// Meanwhile what is Reading::near further on is fetched: the rest of these lines, then the next lines.
  template <int64_t kPairs>
  void side_by_side(const Lines& lines, int64_t first) {
    constexpr int64_t kNear = Reading::near(Format::kType) / Format::kBytes;
    const int64_t near = std::min(kNear, blocks_);
    if constexpr (kNear < kMostOutputs / kQuantBlock) {
      const std::byte* rest[2 * kPairs];
      for (int64_t c = 0; c < 2 * kPairs; ++c) rest[c] = lines.now[c] + near * Format::kBytes;
      add_blocks<kPairs, kTwice>(lines.now, rest, Format::kBytes, lines.after, 0, blocks_ - near, first);
    }
    add_blocks<kPairs, kTwice>(lines.now, lines.next, Format::kBytes, lines.after, blocks_ - near, blocks_,
                               first);
  }

  /// Blocks [begin, end) of 2 · kPairs lines. Meanwhile a block each of as many lines `ahead` is fetched,
  /// `step` bytes further with every block, and if kAfter the same block of the lines `after`.
  template <int64_t kPairs, bool kAfter>
  HWY_INLINE void add_blocks(const std::byte* const* lines, const std::byte* const* ahead, int64_t step,
                             const std::byte* const* after, int64_t begin, int64_t end, int64_t first) {
    // Copies, which stay in registers: without them 11008 outputs at 8 bits were 4 points of the bandwidth
    // slower (Zen 5).
    const std::byte *now[2 * kPairs], *fetched[2 * kPairs];
    std::copy_n(lines, 2 * kPairs, now);
    std::copy_n(ahead, 2 * kPairs, fetched);
    const uint32_t* multipliers = pairs_ + first / 2 * kPadded;
    for (int64_t b = begin, from = 0; b < end; ++b, from += step) {
      const int64_t at = b * Format::kBytes, g = b * Format::kGroups;
      for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
        Sums s = Sums::load(sums_ + b * kQuantBlock + part);
        const auto fetch = [&](int64_t p) HWY_ATTR {
          return Fetch<kAfter>{fetched + 2 * p, after + 2 * p, from, at, part};
        };
        for (int64_t p = 0; p < kPairs; ++p) {
          Format::add_pair(now[2 * p] + at, now[2 * p + 1] + at, part, multipliers + p * kPadded + g, s,
                           fetch(p));
          s.pin();
        }
        s.store(sums_ + b * kQuantBlock + part);
        for (int64_t p = 0; !Reading::kBetween && p < kPairs; ++p)
          for (int64_t quarter = 0; quarter < 4; ++quarter) fetch(p).one(quarter);
      }
    }
  }

  /// A block of a pair's lines `ahead`, if kAfter of those `after` too: four cache lines at most, a quarter
  /// of them with each part of a block. In bursts they wait for the misses that a core may have open (24 on
  /// Zen 4).
  template <bool kAfter>
  struct Fetch {
    const std::byte *const *ahead, *const *after;
    int64_t from, at, part;

    /// Where a quarter of a part's products has been made.
    HWY_INLINE void operator()(int64_t quarter) const {
      if (Reading::kBetween) one(quarter);
    }
    HWY_INLINE void one(int64_t quarter) const {
      const int64_t parts = kQuantBlock / (8 * lanes()), step = part / (8 * lanes()) * 4 + quarter;
      const int64_t k = step / parts;
      if (step % parts != 0) return;
      if (Format::kBytes > kLine) {
        Reading::fetch(ahead[k / 2] + from + k % 2 * kLine);
      } else if (k < 2) {
        Reading::fetch(ahead[k] + from);
      } else if (kAfter) {
        Reading::fetch(after[k - 2] + at);
      }
    }
  };

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
        Reading::fetch(line(index[c]) + scales_at_ + byte);
    }
  }

  static constexpr int64_t kMostGroups = kMostOutputs / kQuantBlock * Format::kGroups;
  static constexpr int64_t kPadded = kMostGroups + 16;
  const std::byte* base_;
  const int64_t bytes_, levels_at_, scales_at_, blocks_, groups_;
  const int64_t follow_;    // channels that a stream fetches beforehand
  const bool streams_;      // channels that follow one another are one stream
  bool in_stream_ = false;  // … as the last ones were
  float* const part_;
  int32_t index_[2 * kChannelBlock];  // what Kept points to where channels are dealt out
  float value_[kChannelBlock];
  HWY_ALIGN int32_t sums_[kMostOutputs];
  HWY_ALIGN float factor_[kPadded];
  HWY_ALIGN uint32_t start_[kPadded];
  HWY_ALIGN uint32_t pairs_[kChannelBlock / 2 * kPadded];
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
