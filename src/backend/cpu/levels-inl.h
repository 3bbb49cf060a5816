// The integer arithmetic of quantised lines (base/quant.h): pairs of channels times pairs of multipliers.
#if defined(LAROSA_LEVELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_LEVELS_INL_H_
#undef LAROSA_LEVELS_INL_H_
#else
#define LAROSA_LEVELS_INL_H_
#endif

#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

// Quantised lines. Widening levels to float32 costs three vector operations per 16 weights, and two threads
// then reach 57 % of the read bandwidth at 4 bits. So levels stay integers: kept channels are taken in pairs,
// their levels side by side as 16-bit halves, and one multiply-add of pairs serves 32 weights. What
// multiplies a channel in a group of outputs, value · scale, is rounded to a sign and 15 bits of the largest
// such number among the channels of a block (kChannelBlock channels that follow one another in a list), an
// error of at most 1/65534 of that; sums within a block are exact, and blocks are added in float32 in order.

constexpr int64_t kChannelBlock = 64;
constexpr float kMostMultiplier = 32767;

using HalfTag = hn::Repartition<int16_t, IntTag>;
using Words = hn::Vec<WordTag>;

/// sum + low half · low half + high half · high half, in every 32-bit lane.
HWY_INLINE Ints dot_pairs(Words levels, Words multipliers, Ints sum) {
  const IntTag di;
#if HWY_TARGET == HWY_AVX3_DL  // one instruction for two: 3.2 ns instead of 3.7 for 128 weights of 4 bits
  // By name: the flags that Highway 1.0 gives the compiler for this set lack avx512vnni, which it checks at
  // run time. Volatile: in its place among fetches (chain-inl.h).
  Ints result = sum;
  asm volatile("vpdpwssd %2, %1, %0" : "+v"(result.raw) : "v"(levels.raw), "v"(multipliers.raw));
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
#if HWY_TARGET == HWY_AVX3_DL
/// sum + byte 0 · byte 0 + … + byte 3 · byte 3, in every 32-bit lane, levels from 0 to 255, digits from −128
/// to 127.
HWY_INLINE Ints dot_bytes(Words levels, Words digits, Ints sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(levels.raw), "v"(digits.raw));
  return sum;
}
#endif
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
#if HWY_TARGET == HWY_AVX2
  const HalfTag d16;
  return hn::BitCast(WordTag(), hn::OddEven(hn::BitCast(d16, hn::ShiftLeft<16>(b)), hn::BitCast(d16, a)));
#else
  return hn::OrAnd(hn::ShiftLeft<16>(b), a, hn::Set(WordTag(), 0xffffu));
#endif
}
HWY_INLINE Words high_halves(Words a, Words b) {
  return hn::OrAnd(hn::ShiftRight<16>(a), b, hn::Set(WordTag(), 0xffff0000u));
}

#if HWY_TARGET != HWY_SCALAR
/// Of every four words the even ones first.
HWY_INLINE Words even_groups_first(Words groups) {
  alignas(64) static constexpr int32_t kOrder[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  return hn::TableLookupLanes(groups, hn::SetTableIndices(WordTag(), kOrder));
}
/// Two words in turns.
HWY_INLINE Words two_words(const void* p) {
  uint64_t two;
  std::memcpy(&two, p, sizeof(two));
  return hn::BitCast(WordTag(), hn::Set(hn::ScalableTag<uint64_t>(), two));
}
#endif

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
  /// Keeps one pair of channels after the other. GCC would load four pairs at once and spill sums: int8
  /// products out of the second-level cache took 1.15 times as long.
  HWY_INLINE void pin() {
#if HWY_TARGET == HWY_AVX2
    asm volatile(""
                 : "+x"(s0.raw), "+x"(s1.raw), "+x"(s2.raw), "+x"(s3.raw), "+x"(s4.raw), "+x"(s5.raw),
                   "+x"(s6.raw), "+x"(s7.raw)
                 :
                 : "memory");
#endif
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

// A format says which sums add_pair makes of two channels, and what belongs to them. x86 from AVX2 on unpacks
// halves of two channels in one instruction; its sums then have an order of their own, which `separate`
// undoes once per block of channels.
#undef LAROSA_UNPACKS
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
#define LAROSA_UNPACKS 1

/// Vectors with four outputs in each block of 128 bits, of four vectors in turn, as vectors of outputs in
/// order.
HWY_INLINE Sums order_blocks(const Sums& w) {
  const IntTag di;
  const auto lower = [&](Ints a, Ints b) HWY_ATTR { return hn::ConcatLowerLower(di, b, a); };
  const auto upper = [&](Ints a, Ints b) HWY_ATTR { return hn::ConcatUpperUpper(di, b, a); };
#if HWY_TARGET == HWY_AVX2
  return {lower(w.s0, w.s1), lower(w.s2, w.s3), upper(w.s0, w.s1), upper(w.s2, w.s3),
          lower(w.s4, w.s5), lower(w.s6, w.s7), upper(w.s4, w.s5), upper(w.s6, w.s7)};
#else
  const auto even = [](Ints a, Ints b) HWY_ATTR { return hn::OddEvenBlocks(hn::SwapAdjacentBlocks(b), a); };
  const auto odd = [](Ints a, Ints b) HWY_ATTR { return hn::OddEvenBlocks(b, hn::SwapAdjacentBlocks(a)); };
  const Ints a0 = even(w.s0, w.s1), a1 = odd(w.s0, w.s1), b0 = even(w.s2, w.s3), b1 = odd(w.s2, w.s3);
  const Ints c0 = even(w.s4, w.s5), c1 = odd(w.s4, w.s5), d0 = even(w.s6, w.s7), d1 = odd(w.s6, w.s7);
  return {lower(a0, b0), lower(a1, b1), upper(a0, b0), upper(a1, b1),
          lower(c0, d0), lower(c1, d1), upper(c0, d0), upper(c1, d1)};
#endif
}
#else
#define LAROSA_UNPACKS 0
#endif

/// Stored word L of 64 values holds values 4 L … 4 L + 3.
struct Int8 {
  static constexpr DType kType = DType::int8;
  static constexpr int64_t kGroups = 1, kBytes = kQuantBlock;  // of a block
  static constexpr int32_t kOffset = 128;                      // levels become q + 128

  /// Group of the vector that `separate` leaves at `place` of a block, and where it goes in the block's part.
  static HWY_INLINE int64_t group(int64_t) { return 0; }
  static HWY_INLINE int64_t output(int64_t place) { return place; }
  /// Numbers of whole blocks' groups in the order that add_pair wants, and from there those of the vector of
  /// sums at `place`.
  static HWY_INLINE Words arrange(Words groups) { return groups; }
  static HWY_INLINE Words spread(const uint32_t* groups, int64_t) { return hn::Set(WordTag(), groups[0]); }
  // offsets: how often the offset stands in the vector of sums at `place`; separate: the vectors without one
  // another.
#if LAROSA_UNPACKS
  // A whole half, 256 · upper + (lower + 128), is summed beside its upper byte. Such sums wrap, but what is
  // left without 256 · upper does not: with AVX2 28 vector operations for 128 weights instead of 40, with
  // AVX-512 24 for 256 instead of 32. Outputs leave in order.
  static constexpr int kWays = 1;
  static HWY_INLINE int32_t offsets(int64_t place) {
    return place / lanes() % 2 == 0;
  }
  static HWY_INLINE Sums separate(const Sums& s) {
    const IntTag di;
    const auto lower = [](Ints half, Ints upper) HWY_ATTR { return hn::Sub(half, hn::ShiftLeft<8>(upper)); };
    const Ints l0 = lower(s.s0, s.s1), l1 = lower(s.s2, s.s3), l2 = lower(s.s4, s.s5), l3 = lower(s.s6, s.s7);
    return order_blocks({hn::InterleaveLower(di, l0, s.s1), hn::InterleaveUpper(di, l0, s.s1),
                         hn::InterleaveLower(di, l1, s.s3), hn::InterleaveUpper(di, l1, s.s3),
                         hn::InterleaveLower(di, l2, s.s5), hn::InterleaveUpper(di, l2, s.s5),
                         hn::InterleaveLower(di, l3, s.s7), hn::InterleaveUpper(di, l3, s.s7)});
  }
  template <class Fetch>
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s, const Fetch& fetch) {
    const HalfTag d16;
    const auto m = hn::BitCast(d16, hn::Set(WordTag(), multipliers[0]));
    const auto flip = hn::Set(d16, 0x80);
    const auto dots = [&](auto u, Ints& half, Ints& upper) HWY_ATTR {
      half = dot_pairs(hn::BitCast(WordTag(), u), hn::BitCast(WordTag(), m), half);
      upper = dot_pairs(hn::BitCast(WordTag(), hn::ShiftRight<8>(u)), hn::BitCast(WordTag(), m), upper);
    };
    const int64_t next = part + 4 * lanes();
    const auto a0 = hn::BitCast(d16, load_words(a + part)), b0 = hn::BitCast(d16, load_words(b + part));
    const auto a1 = hn::BitCast(d16, load_words(a + next)), b1 = hn::BitCast(d16, load_words(b + next));
    dots(hn::Xor(hn::InterleaveLower(d16, a0, b0), flip), s.s0, s.s1);
    fetch(0);
    dots(hn::Xor(hn::InterleaveUpper(d16, a0, b0), flip), s.s2, s.s3);
    fetch(1);
    dots(hn::Xor(hn::InterleaveLower(d16, a1, b1), flip), s.s4, s.s5);
    fetch(2);
    dots(hn::Xor(hn::InterleaveUpper(d16, a1, b1), flip), s.s6, s.s7);
    fetch(3);
  }
#else
  static constexpr int kWays = 4;  // vectors of sums that gemv_join interleaves
  static HWY_INLINE int32_t offsets(int64_t) {
    return 1;
  }
  static HWY_INLINE Sums separate(const Sums& s) {
    return s;
  }
  template <class Fetch>
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s, const Fetch& fetch) {
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
    fetch(0);
    s.s2 = dot_pairs(hn::And(v0, byte), m, s.s2);
    s.s3 = dot_pairs(shift_halves<8>(v0), m, s.s3);
    fetch(1);
    s.s4 = dot_pairs(hn::And(u1, byte), m, s.s4);
    s.s5 = dot_pairs(shift_halves<8>(u1), m, s.s5);
    fetch(2);
    s.s6 = dot_pairs(hn::And(v1, byte), m, s.s6);
    s.s7 = dot_pairs(shift_halves<8>(v1), m, s.s7);
    fetch(3);
  }
#endif
};

/// Nibble k of word L: value 16 k + L of 128, stored as q + 8. A part takes all nibbles of as many words as a
/// vector has. Two neighbours have one multiplier, so a whole byte is summed beside one of its nibbles and
/// the other one is what remains: 20 vector operations for 256 weights instead of 24. Sums stay below
/// 255 · 32767 · kChannelBlock, less than 2^30.
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
#if LAROSA_UNPACKS
  // Unpacked, lanes hold nibbles 0 … 3 and 4 … 7 of a word in turn, of groups 0, 1 and 2, 3: with
  // AVX2 26 vector operations for 128 weights instead of 30, with AVX-512 22 for 256 instead of 26.
  static HWY_INLINE Words arrange(Words groups) {
    return even_groups_first(groups);
  }
  static HWY_INLINE Words spread(const uint32_t* groups, int64_t place) {
    return two_words(groups + place / (2 * lanes()) % 2 * 2);
  }
  static HWY_INLINE Sums separate(const Sums& t) {
    const IntTag di;
    const auto upper = [](Ints byte, Ints low) HWY_ATTR { return hn::ShiftRight<4>(hn::Sub(byte, low)); };
    const auto lower = [](Ints byte, Ints high) HWY_ATTR { return hn::Sub(byte, hn::ShiftLeft<4>(high)); };
    const auto sort = [&](Ints a, Ints b, Ints& low, Ints& high) HWY_ATTR {
      const Ints x = hn::InterleaveLower(di, a, b), y = hn::InterleaveUpper(di, a, b);
      low = hn::InterleaveLower(di, x, y);
      high = hn::InterleaveUpper(di, x, y);
    };
    Sums s;
    sort(t.s0, t.s4, s.s0, s.s4);
    sort(upper(t.s1, t.s0), upper(t.s5, t.s4), s.s1, s.s5);
    sort(lower(t.s2, t.s3), lower(t.s6, t.s7), s.s2, s.s6);
    sort(t.s3, t.s7, s.s3, s.s7);
    return s;
  }
  template <class Fetch>
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s, const Fetch& fetch) {
    const WordTag d32;
    const HalfTag d16;
    const Words nibble = hn::Set(d32, 0x000f000fu), byte = hn::Set(d32, 0x00ff00ffu);
    const auto wa = hn::BitCast(d16, load_words(a + part / 2)),
               wb = hn::BitCast(d16, load_words(b + part / 2));
    const Words u = hn::BitCast(d32, hn::InterleaveLower(d16, wa, wb));
    const Words v = hn::BitCast(d32, hn::InterleaveUpper(d16, wa, wb));
    const Words m0 = spread(multipliers, 0), m1 = spread(multipliers, 2 * lanes());
    s.s0 = dot_pairs(hn::And(u, nibble), m0, s.s0);
    s.s1 = dot_pairs(hn::And(u, byte), m0, s.s1);
    fetch(0);
    s.s2 = dot_pairs(shift_halves<8>(u), m1, s.s2);
    s.s3 = dot_pairs(shift_halves<12>(u), m1, s.s3);
    fetch(1);
    s.s4 = dot_pairs(hn::And(v, nibble), m0, s.s4);
    s.s5 = dot_pairs(hn::And(v, byte), m0, s.s5);
    fetch(2);
    s.s6 = dot_pairs(shift_halves<8>(v), m1, s.s6);
    s.s7 = dot_pairs(shift_halves<12>(v), m1, s.s7);
    fetch(3);
  }
#else
  static HWY_INLINE Words arrange(Words groups) {
    return groups;
  }
  static HWY_INLINE Words spread(const uint32_t* groups, int64_t place) {
    return hn::Set(WordTag(), groups[group(place)]);
  }
  static HWY_INLINE Sums separate(const Sums& s) {
    const auto upper = [](Ints byte, Ints low) HWY_ATTR { return hn::ShiftRight<4>(hn::Sub(byte, low)); };
    const auto lower = [](Ints byte, Ints high) HWY_ATTR { return hn::Sub(byte, hn::ShiftLeft<4>(high)); };
    return {s.s0, upper(s.s1, s.s0), lower(s.s2, s.s3), s.s3,
            s.s4, upper(s.s5, s.s4), lower(s.s6, s.s7), s.s7};
  }
  template <class Fetch>
  static HWY_INLINE void add_pair(const std::byte* a, const std::byte* b, int64_t part,
                                  const uint32_t* multipliers, Sums& s, const Fetch& fetch) {
    const WordTag d32;
    const Words nibble = hn::Set(d32, 0x000f000fu), byte = hn::Set(d32, 0x00ff00ffu);
    const Words wa = load_words(a + part / 2), wb = load_words(b + part / 2);
    const Words u = low_halves(wa, wb), v = high_halves(wa, wb);
    const Words m0 = hn::Set(d32, multipliers[0]), m1 = hn::Set(d32, multipliers[1]);
    const Words m2 = hn::Set(d32, multipliers[2]), m3 = hn::Set(d32, multipliers[3]);
    s.s0 = dot_pairs(hn::And(u, nibble), m0, s.s0);
    s.s1 = dot_pairs(hn::And(u, byte), m0, s.s1);
    fetch(0);
    s.s2 = dot_pairs(shift_halves<8>(u), m1, s.s2);
    s.s3 = dot_pairs(shift_halves<12>(u), m1, s.s3);
    fetch(1);
    s.s4 = dot_pairs(hn::And(v, nibble), m2, s.s4);
    s.s5 = dot_pairs(hn::And(v, byte), m2, s.s5);
    fetch(2);
    s.s6 = dot_pairs(shift_halves<8>(v), m3, s.s6);
    s.s7 = dot_pairs(shift_halves<12>(v), m3, s.s7);
    fetch(3);
  }
#endif
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#endif
