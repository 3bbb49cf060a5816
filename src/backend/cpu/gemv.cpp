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

// Quantised lines. Widening levels to float32 costs three vector operations per 16 weights, and two threads
// then reach 57 % of the read bandwidth at 4 bits. So levels stay integers: kept channels are taken in pairs,
// their levels side by side as 16-bit halves, and one multiply-add of pairs serves 32 weights. What
// multiplies a channel in a group of outputs, value · scale, is rounded to a sign and 15 bits of the largest
// such number among the channels of a block (kChainBlock channels), an error of at most 1/65534 of that; sums
// within a block are exact, and blocks are added in float32 in order. A zero channel changes nothing: neither
// the largest number nor a sum.

// Of a pass. Whole lines are one stream each; cut into passes of 4096 outputs, 11008 → 4096 at 4 bits went
// from 19 to 13 GB/s a thread, though the sums of 16384 outputs no longer fit into the first-level cache.
constexpr int64_t kMostOutputs = 16384;
constexpr float kMostMultiplier = 32767;

using HalfTag = hn::Repartition<int16_t, IntTag>;
using Words = hn::Vec<WordTag>;

/// sum + low half · low half + high half · high half, in every 32-bit lane.
HWY_INLINE Ints dot_pairs(Words levels, Words multipliers, Ints sum) {
  const IntTag di;
#if HWY_TARGET == HWY_AVX3_DL  // one instruction for two: 3.2 ns instead of 3.7 for 128 weights of 4 bits
  // By name: the flags that Highway 1.0 gives the compiler for this set lack avx512vnni, which it checks at
  // run time.
  Ints result = sum;
  asm("vpdpwssd %2, %1, %0" : "+v"(result.raw) : "v"(levels.raw), "v"(multipliers.raw));
  return result;
#elif HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  const HalfTag d16;
  Ints unused = hn::Zero(di);
  return hn::ReorderWidenMulAccumulate(di, hn::BitCast(d16, levels), hn::BitCast(d16, multipliers), sum,
                                       unused);
#else
  const Ints a = hn::BitCast(di, levels), b = hn::BitCast(di, multipliers);
  const Ints low =
      hn::Mul(hn::ShiftRight<16>(hn::ShiftLeft<16>(a)), hn::ShiftRight<16>(hn::ShiftLeft<16>(b)));
  return hn::Add(sum, hn::Add(low, hn::Mul(hn::ShiftRight<16>(a), hn::ShiftRight<16>(b))));
#endif
}
template <int kBits>
HWY_INLINE Words shift_halves(Words words) {
#if HWY_TARGET == HWY_SCALAR  // has no halves
  return hn::And(hn::ShiftRight<kBits>(words), hn::Set(WordTag(), (0xffffu >> kBits) * 0x10001u));
#else
  const hn::Repartition<uint16_t, WordTag> d16;
  return hn::BitCast(WordTag(), hn::ShiftRight<kBits>(hn::BitCast(d16, words)));
#endif
}
/// The low halves of both, and the high halves of both.
HWY_INLINE Words low_halves(Words a, Words b) {
  return hn::OrAnd(hn::ShiftLeft<16>(b), a, hn::Set(WordTag(), 0xffffu));
}
HWY_INLINE Words high_halves(Words a, Words b) {
  return hn::OrAnd(hn::ShiftRight<16>(a), b, hn::Set(WordTag(), 0xffff0000u));
}

/// Eight vectors of sums: what the registers of every target hold beside operands.
struct Sums {
  Ints s0, s1, s2, s3, s4, s5, s6, s7;

  static HWY_INLINE Sums load(const int32_t* p) {
    const IntTag di;
    const int64_t n = lanes();
    return {hn::Load(di, p),         hn::Load(di, p + n),     hn::Load(di, p + 2 * n),
            hn::Load(di, p + 3 * n), hn::Load(di, p + 4 * n), hn::Load(di, p + 5 * n),
            hn::Load(di, p + 6 * n), hn::Load(di, p + 7 * n)};
  }
  HWY_INLINE void store(int32_t* p) const {
    const IntTag di;
    const int64_t n = lanes();
    hn::Store(s0, di, p);
    hn::Store(s1, di, p + n);
    hn::Store(s2, di, p + 2 * n);
    hn::Store(s3, di, p + 3 * n);
    hn::Store(s4, di, p + 4 * n);
    hn::Store(s5, di, p + 5 * n);
    hn::Store(s6, di, p + 6 * n);
    hn::Store(s7, di, p + 7 * n);
  }
  /// body(k, vector k).
  template <class Body>
  HWY_INLINE void each(const Body& body) const {
    body(0, s0);
    body(1, s1);
    body(2, s2);
    body(3, s3);
    body(4, s4);
    body(5, s5);
    body(6, s6);
    body(7, s7);
  }
};

/// Stored word L of 64 values holds values 4 L … 4 L + 3, so four vectors of sums are interleaved
/// (gemv_join).
struct Int8 {
  static constexpr DType kType = DType::int8;
  static constexpr int64_t kGroups = 1, kBytes = kQuantBlock;  // of a block
  static constexpr int32_t kOffset = 128;                      // levels become q + 128

  /// Group of the vector of sums that stands at `place` of a block, and where it goes in the block's part.
  static HWY_INLINE int64_t group(int64_t) { return 0; }
  static HWY_INLINE int64_t output(int64_t place) { return place; }
  /// How often the offset stands in the vector of sums at `place`, and the vectors without one another.
  static HWY_INLINE int32_t offsets(int64_t) { return 1; }
  static HWY_INLINE Sums separate(const Sums& s) { return s; }
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s) {
    const WordTag d32;
    const Words m = hn::Set(d32, multipliers[0]), flip = hn::Set(d32, 0x80808080u),
                byte = hn::Set(d32, 0x00ff00ffu);
    const int64_t half = part + 4 * lanes();
    const Words a0 = load_words(a + part), b0 = load_words(b + part), a1 = load_words(a + half),
                b1 = load_words(b + half);
    const Words u0 = hn::Xor(low_halves(a0, b0), flip), v0 = hn::Xor(high_halves(a0, b0), flip);
    const Words u1 = hn::Xor(low_halves(a1, b1), flip), v1 = hn::Xor(high_halves(a1, b1), flip);
    s.s0 = dot_pairs(hn::And(u0, byte), m, s.s0);
    s.s1 = dot_pairs(shift_halves<8>(u0), m, s.s1);
    s.s2 = dot_pairs(hn::And(v0, byte), m, s.s2);
    s.s3 = dot_pairs(shift_halves<8>(v0), m, s.s3);
    s.s4 = dot_pairs(hn::And(u1, byte), m, s.s4);
    s.s5 = dot_pairs(shift_halves<8>(u1), m, s.s5);
    s.s6 = dot_pairs(hn::And(v1, byte), m, s.s6);
    s.s7 = dot_pairs(shift_halves<8>(v1), m, s.s7);
  }
};

/// Nibble k of word L: value 16 k + L of 128, stored as q + 8. A part takes all nibbles of as many words as a
/// vector has. Two neighbours have one multiplier, so a whole byte is summed beside one of its nibbles and
/// the other one is what remains: 20 vector operations for 256 weights instead of 24. Sums stay below
/// 255 · 32767 · kChainBlock, less than 2^30.
struct Int4 {
  static constexpr DType kType = DType::int4;
  static constexpr int64_t kGroups = 4, kBytes = kQuantBlock / 2;
  static constexpr int32_t kOffset = 8;

  static HWY_INLINE int64_t group(int64_t place) { return place / (2 * lanes()) % 4; }
  static HWY_INLINE int64_t output(int64_t place) {
    return place / lanes() % 8 * 16 + place / (8 * lanes()) * lanes();
  }
  static HWY_INLINE int32_t offsets(int64_t place) {
    const int64_t k = place / lanes() % 4;
    return k == 1 || k == 2 ? 17 : 1;
  }
  static HWY_INLINE Sums separate(const Sums& s) {
    const auto upper = [](Ints byte, Ints low) HWY_ATTR { return hn::ShiftRight<4>(hn::Sub(byte, low)); };
    const auto lower = [](Ints byte, Ints high) HWY_ATTR { return hn::Sub(byte, hn::ShiftLeft<4>(high)); };
    return {s.s0, upper(s.s1, s.s0), lower(s.s2, s.s3), s.s3,
            s.s4, upper(s.s5, s.s4), lower(s.s6, s.s7), s.s7};
  }
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s) {
    const WordTag d32;
    const Words nibble = hn::Set(d32, 0x000f000fu), byte = hn::Set(d32, 0x00ff00ffu);
    const Words wa = load_words(a + part / 2), wb = load_words(b + part / 2);
    const Words u = low_halves(wa, wb), v = high_halves(wa, wb);
    const Words m0 = hn::Set(d32, multipliers[0]), m1 = hn::Set(d32, multipliers[1]);
    const Words m2 = hn::Set(d32, multipliers[2]), m3 = hn::Set(d32, multipliers[3]);
    s.s0 = dot_pairs(hn::And(u, nibble), m0, s.s0);
    s.s1 = dot_pairs(hn::And(u, byte), m0, s.s1);
    s.s2 = dot_pairs(shift_halves<8>(u), m1, s.s2);
    s.s3 = dot_pairs(shift_halves<12>(u), m1, s.s3);
    s.s4 = dot_pairs(hn::And(v, nibble), m2, s.s4);
    s.s5 = dot_pairs(hn::And(v, byte), m2, s.s5);
    s.s6 = dot_pairs(shift_halves<8>(v), m3, s.s6);
    s.s7 = dot_pairs(shift_halves<12>(v), m3, s.s7);
  }
};

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
    for (int64_t g = 0; g < groups_; g += lanes()) {
      // Bits of magnitudes order like these, infinity and NaN above all others.
      Ints top = hn::Zero(di);
      for (int64_t c = 0; c < count; ++c) {
        const Floats p = hn::Mul(scales(line(index[c]), g), hn::Set(d, value[c]));
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
        const Words pair = low_halves(rounded(wide[c]), b);
        sum = dot_pairs(pair, ones, sum);
        hn::Store(pair, WordTag(), pairs_[c / 2] + g);
      }
      hn::Store(hn::Mul(sum, hn::Set(di, -Format::kOffset)), di, start_ + g);
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t place = 0; place < kQuantBlock; place += lanes()) {
        const int32_t start = start_[b * Format::kGroups + Format::group(place)] * Format::offsets(place);
        hn::Store(hn::Set(di, start), di, sums_ + b * kQuantBlock + place);
      }
    }
  }

  HWY_INLINE Floats scales(const std::byte* line, int64_t g) const {
    const std::byte* from = line + scales_at_ + 2 * g;
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
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t at = b * Format::kBytes, g = b * Format::kGroups;
      for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
        Sums s = Sums::load(sums_ + b * kQuantBlock + part);
        for (int64_t c = 0; c < count; c += 2) {
          if (part == 0) fetch(ahead + c, 2, at);
          Format::add_pair(now[c] + at, now[c + 1] + at, part, pairs_[(first + c) / 2] + g, s);
        }
        if (part == 0) fetch(ahead + (count + 1) / 2 * 2, kChannels - (count + 1) / 2 * 2, at);
        s.store(sums_ + b * kQuantBlock + part);
      }
    }
  }

  /// A block of some lines. Called between the products: a burst of 16 would wait for the 24 misses that a
  /// core may have open.
  static HWY_INLINE void fetch(const std::byte* const* lines, int64_t count, int64_t at) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t byte = at; byte < at + Format::kBytes; byte += kLine)
        __builtin_prefetch(lines[c] + byte, 0, 2);
    }
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
  HWY_ALIGN int32_t start_[kPadded];
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
/// a word).
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
  const auto join = w.dtype == DType::bf16 ? join_as<2> : w.dtype == DType::int8 ? join_as<4> : join_as<1>;
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
