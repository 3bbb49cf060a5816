// Rows of a weight against one x: dot products for weights in rows layout.
#if defined(LAROSA_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_ROWS_INL_H_
#undef LAROSA_ROWS_INL_H_
#else
#define LAROSA_ROWS_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "backend/cpu/levels-inl.h"
#include "backend/cpu/reading-inl.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

/// dot[r] = row r · x, of kRows rows `apart` weights apart, each fetched meanwhile where they are several
/// (reading-inl.h). Two steps at a time keep four multiply-adds of a row in flight.
template <class Reading, class Format, int64_t kRows>
HWY_INLINE void dot_rows(const typename Format::Stored* w, int64_t apart, int64_t n, const float* x,
                         float* dot) {
  const FloatTag d;
  const int64_t step = 2 * lanes(), whole = n / (2 * step) * (2 * step);
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(*w)), kNear = Reading::near(Format::kType) / kSize;
  Floats a[kRows], b[kRows], c[kRows], e[kRows];
  for (int64_t r = 0; r < kRows; ++r) a[r] = b[r] = c[r] = e[r] = hn::Zero(d);
  for (int64_t i = 0; i < whole; i += 2 * step) {
    const Floats x0 = hn::LoadU(d, x + i), x1 = hn::LoadU(d, x + i + lanes());
    const Floats x2 = hn::LoadU(d, x + i + step), x3 = hn::LoadU(d, x + i + step + lanes());
    for (int64_t r = 0; r < kRows; ++r) {
      const auto* const row = w + r * apart + i;
      const Pair p = Format::load(row), q = Format::load(row + step);
      a[r] = hn::MulAdd(x0, p.a, a[r]);
      b[r] = hn::MulAdd(x1, p.b, b[r]);
      c[r] = hn::MulAdd(x2, q.a, c[r]);
      e[r] = hn::MulAdd(x3, q.b, e[r]);
      for (int64_t at = 0; kRows > 1 && at < 2 * step; at += kLine / kSize) Reading::fetch(row + kNear + at);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = whole; i < n; i += step) {
      const auto* const row = w + r * apart + i;
      const Pair p = i + step <= n ? Format::load(row) : load_tail<Format>(row, n - i);
      a[r] = hn::MulAdd(hn::LoadU(d, x + i), p.a, a[r]);
      b[r] = hn::MulAdd(hn::LoadU(d, x + i + lanes()), p.b, b[r]);
    }
    dot[r] = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a[r], b[r]), hn::Add(c[r], e[r]))));
  }
}

// Quantised rows. As in channels, levels stay integers: x is rounded to a sign and 15 bits of the largest
// entry of its block of 128, in the order in which products want them; sums within a group are exact, and
// groups are added in float32. Where bytes are multiplied by fours (VNNI), the numbers for 4 bits are two
// digits, 256 · upper + lower, both from −128 to 127: 12 vector operations for 128 weights instead of 17.

#undef LAROSA_DIGITS
#define LAROSA_DIGITS (HWY_TARGET == HWY_AVX3_DL)

/// The row x, rounded, in the room of padded_line(n) floats: numbers of 16 bits, kQuantBlock a block in the
/// format's order; from float `starts` on the sums at which a block's products begin, kStarts of 32 bits;
/// from float `units` on what one of a group's numbers stands for.
template <DType kType>
struct RoundedRow {
  static constexpr bool kDigits = LAROSA_DIGITS && kType == DType::int4;
  static constexpr float kMost = kDigits ? 127 * 256 + 127 : kMostMultiplier;
  static constexpr int64_t kGroups = kQuantBlock / quant_group(kType);  // of a block
  static constexpr int64_t kStarts = kDigits ? 16 : kType == DType::int4 ? 32 : 0;
  static int64_t starts(int64_t n) { return padded_line(n) / 2; }
  static int64_t units(int64_t n) { return starts(n) + padded_line(n) / kQuantBlock * kStarts; }
};

/// Which value of a block stands at `place` of its numbers. int4: word L's nibble k is value 16 k + L; the
/// halves of two neighbouring words are one lane, of their lower halves in even lanes. As digits: the bytes
/// of four words by groups, lower nibbles first.
template <DType kType>
HWY_INLINE int64_t value_at(int64_t place) {
  if (kType == DType::int8 || lanes() == 1) return place;
  if (RoundedRow<kType>::kDigits)
    return 32 * (place / 4 % 4) + 16 * (place / 64) + 4 * (place / 16 % 4) + place % 4;
  const int64_t lane = place / 2 % lanes(), quarter = place / (2 * lanes());
  const int64_t word = quarter / 4 * lanes() + lane / 2 * 2 + place % 2;
  return 16 * (quarter % 4 + lane % 2 * 4) + word;
}

template <DType kType>
void round_row(const float* x, int64_t n, float* row) {
  using Row = RoundedRow<kType>;
  const FloatTag d;
  const IntTag di;
  auto* const numbers = reinterpret_cast<int16_t*>(row);
  auto* const starts = reinterpret_cast<int32_t*>(row + Row::starts(n));
  float* const units = row + Row::units(n);
  HWY_ALIGN float value[kQuantBlock];
  HWY_ALIGN int32_t rounded[kQuantBlock];
  for (int64_t b = 0; b * kQuantBlock < n; ++b) {
    const int64_t first = b * kQuantBlock, count = std::min(kQuantBlock, n - first);
    std::fill(std::copy_n(x + first, count, value), value + kQuantBlock, 0.0f);
    // Bits of magnitudes order like these, infinity and NaN above all others.
    Ints top = hn::Zero(di);
    for (int64_t i = 0; i < kQuantBlock; i += lanes())
      top = hn::Max(top, hn::BitCast(di, hn::Abs(hn::Load(d, value + i))));
    const float largest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, top)));
    const bool seen = std::isfinite(largest) && largest > 0x1p-100f;  // as in channels
    const Floats inverse = hn::Set(d, seen ? Row::kMost / largest : 0);
    for (int64_t i = 0; i < kQuantBlock; i += lanes()) {
      const Floats v = seen ? hn::Mul(hn::Load(d, value + i), inverse) : hn::Zero(d);
      hn::Store(hn::NearestInt(v), di, rounded + i);
    }
    int16_t* const block = numbers + first;
    const float unit = std::isfinite(largest) ? largest / Row::kMost : std::nanf("");
    for (int64_t g = 0; g < Row::kGroups; ++g)  // none behind the last value
      units[b * Row::kGroups + g] = g * quant_group(kType) < count ? unit : 0;
    // Levels of 4 bits are stored as q + 8.
    if constexpr (Row::kDigits) {
      auto* const upper = reinterpret_cast<int8_t*>(block);
      std::fill_n(starts + b * Row::kStarts, Row::kStarts, 0);
      for (int64_t place = 0; place < kQuantBlock; ++place) {
        const int32_t number = rounded[value_at<kType>(place)];
        upper[place + kQuantBlock] = static_cast<int8_t>(number);
        upper[place] = static_cast<int8_t>((number - upper[place + kQuantBlock]) / 256);
        starts[b * Row::kStarts + place % 64 / 4] -= 8 * number;
      }
      continue;
    }
    for (int64_t place = 0; place < kQuantBlock; ++place)
      block[place] = static_cast<int16_t>(rounded[value_at<kType>(place)]);
    for (int64_t s = 0; s < Row::kStarts; ++s) {
      const int16_t* const pair = block + s / lanes() * 4 * lanes() + s % lanes() * 2;
      starts[b * Row::kStarts + s] = -8 * (pair[0] + pair[1] + pair[2 * lanes()] + pair[2 * lanes() + 1]);
    }
  }
}

/// sums += scale · Σ x · q of a block, by turns in `a` and `b`, so that one chain of multiply-adds does not
/// wait for itself (digits: in `a`).
HWY_INLINE void add_int8(const std::byte* block, const int16_t* x, const float* scale, Floats& a,
                         [[maybe_unused]] Floats& b) {
  const FloatTag d;
#if HWY_TARGET == HWY_SCALAR  // has no halves
  int32_t dot = 0;
  for (int64_t i = 0; i < kQuantBlock; ++i) dot += x[i] * static_cast<int8_t>(block[i]);
  a = hn::MulAdd(hn::Set(d, static_cast<float>(dot)), hn::Set(d, scale[0]), a);
#else
  const HalfTag d16;
  const hn::Rebind<int8_t, HalfTag> d8;
  const auto dot = [&](int64_t at, Ints sum) HWY_ATTR {
    const auto levels = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(block + at)));
    return dot_pairs(hn::BitCast(WordTag(), levels), hn::BitCast(WordTag(), hn::LoadU(d16, x + at)), sum);
  };
  Ints even = hn::Zero(IntTag()), odd = even;
  for (int64_t at = 0; at < kQuantBlock; at += 4 * lanes()) {
    even = dot(at, even);
    odd = dot(at + 2 * lanes(), odd);
  }
  a = hn::MulAdd(hn::ConvertTo(d, even), hn::Set(d, scale[0]), a);
  b = hn::MulAdd(hn::ConvertTo(d, odd), hn::Set(d, scale[0]), b);
#endif
}
HWY_INLINE void add_int4(const std::byte* block, const int16_t* x, [[maybe_unused]] const int32_t* starts,
                         const float* scale, Floats& a, [[maybe_unused]] Floats& b) {
  const FloatTag d;
#if HWY_TARGET == HWY_SCALAR
  for (int64_t g = 0; g < 4; ++g) {
    int32_t dot = 0;
    for (int64_t i = 32 * g; i < 32 * g + 32; ++i) {
      const int nibbles = static_cast<int>(block[i % 16 * 4 + i / 32]);
      dot += x[i] * ((nibbles >> (i / 16 % 2 * 4) & 15) - 8);
    }
    a = hn::MulAdd(hn::Set(d, static_cast<float>(dot)), hn::Set(d, scale[g]), a);
  }
#elif LAROSA_DIGITS
  const hn::Repartition<uint8_t, WordTag> d8;
  alignas(16) static constexpr uint8_t kGroups[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const auto by_groups = hn::BitCast(WordTag(), hn::LoadDup128(d8, kGroups));
  const Words w = hn::TableLookupBytes(load_words(block), by_groups),
              nibble = hn::Set(WordTag(), 0x0f0f0f0fu);
  const Words low = hn::And(w, nibble), high = hn::And(hn::ShiftRight<4>(w), nibble);
  const auto digits = [&](int64_t k) HWY_ATTR {
    return hn::BitCast(WordTag(), hn::LoadU(hn::Repartition<int16_t, IntTag>(), x + k * 2 * lanes()));
  };
  const Ints upper = dot_bytes(high, digits(1), dot_bytes(low, digits(0), hn::Zero(IntTag())));
  const Ints sum = hn::Add(hn::ShiftLeft<8>(upper), hn::Load(IntTag(), starts));
  a = hn::MulAdd(hn::ConvertTo(d, dot_bytes(high, digits(3), dot_bytes(low, digits(2), sum))),
                 hn::LoadDup128(d, scale), a);
#else
  const HalfTag d16;
  const hn::Repartition<uint8_t, WordTag> d8;
  // Groups 0 and 2 in turns, 1 and 3.
  const Floats scale_a = hn::BitCast(d, two_words(scale)), scale_b = hn::BitCast(d, two_words(scale + 2));
  // Halves of two neighbouring words side by side.
  alignas(16) static constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  const auto order = hn::LoadDup128(d8, kOrder);
  const Words nibble = hn::Set(WordTag(), 0x000f000fu);
  for (int64_t word = 0; word < 16; word += lanes()) {
    const Words w = hn::TableLookupBytes(load_words(block + word * 4), hn::BitCast(WordTag(), order));
    const auto numbers = [&](int64_t quarter) HWY_ATTR {
      return hn::BitCast(WordTag(), hn::LoadU(d16, x + word * 8 + quarter * 2 * lanes()));
    };
    Ints s = hn::LoadU(IntTag(), starts + 2 * word), t = hn::LoadU(IntTag(), starts + 2 * word + lanes());
    s = dot_pairs(hn::And(w, nibble), numbers(0), s);
    s = dot_pairs(hn::And(shift_halves<4>(w), nibble), numbers(1), s);
    t = dot_pairs(hn::And(shift_halves<8>(w), nibble), numbers(2), t);
    t = dot_pairs(shift_halves<12>(w), numbers(3), t);
    a = hn::MulAdd(hn::ConvertTo(d, s), scale_a, a);
    b = hn::MulAdd(hn::ConvertTo(d, t), scale_b, b);
  }
#endif
}

/// What an integer sum of each group stands for, scale · unit, in the order in which products want them: zero
/// where x is, whatever a file has there. Behind a line's scales is padding.
template <DType kType>
HWY_INLINE void scale_units(const std::byte* scales, const float* units, int64_t count, float* to) {
  const FloatTag d;
  for (int64_t i = 0; i < count; i += lanes()) {
    const Floats unit = load_part(d, units + i, count - i);
    // Not Ne: on x86 it is false for NaN, which has to come through.
    Floats v = hn::IfThenZeroElse(hn::Eq(unit, hn::Zero(d)), hn::Mul(load_halves(scales + 2 * i), unit));
#if HWY_TARGET != HWY_SCALAR
    if (kType == DType::int4 && !RoundedRow<kType>::kDigits)
      v = hn::BitCast(d, even_groups_first(hn::BitCast(WordTag(), v)));
#endif
    hn::Store(v, d, to + i);
  }
}

/// As dot_rows, of quantised rows, `apart` bytes apart.
template <class Reading, DType kType, int64_t kRows>
HWY_INLINE void dot_levels(const std::byte* lines, int64_t apart, int64_t n, const float* row, float* dot) {
  using Row = RoundedRow<kType>;
  constexpr int64_t kScales = 64, kGroups = Row::kGroups, kBlocks = kScales / kGroups;
  constexpr int64_t kBytes = scales_offset(kType, kQuantBlock);
  constexpr bool kFetches = kRows > 1;
  const FloatTag d;
  const auto* const numbers = reinterpret_cast<const int16_t*>(row);
  const auto* const starts = reinterpret_cast<const int32_t*>(row + Row::starts(n));
  const float* const units = row + Row::units(n);
  const int64_t scales = scales_offset(kType, n), length = line_bytes(kType, n);
  const int64_t blocks = padded_line(n) / kQuantBlock;
  // The next rows' scales, which are wanted before their first level; levels are fetched below.
  for (int64_t r = 0; kFetches && r < kRows; ++r)
    for (int64_t at = length + scales; at < 2 * length; at += kLine) Reading::fetch(lines + r * apart + at);
  HWY_ALIGN float scale[kRows][kScales];
  Floats a[kRows], b[kRows];
  for (int64_t r = 0; r < kRows; ++r) a[r] = b[r] = hn::Zero(d);
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t end = std::min(first + kBlocks, blocks), g = first * kGroups;
    for (int64_t r = 0; r < kRows; ++r)
      scale_units<kType>(lines + r * apart + scales + g * 2, units + g, (end - first) * kGroups, scale[r]);
    for (int64_t i = first; i < end; ++i) {
      for (int64_t r = 0; r < kRows; ++r) {
        const float* const of_block = scale[r] + (i - first) * kGroups;
        const std::byte* const block = lines + r * apart + i * kBytes;
        if constexpr (kType == DType::int8) {
          add_int8(block, numbers + i * kQuantBlock, of_block, a[r], b[r]);
        } else {
          add_int4(block, numbers + i * kQuantBlock, starts + i * Row::kStarts, of_block, a[r], b[r]);
        }
        for (int64_t at = 0; kFetches && at < kBytes; at += kLine) {
          const int64_t far = i * kBytes + Reading::near(kType) + at;
          Reading::fetch(lines + r * apart + far + (far < scales ? 0 : length - scales));
        }
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) dot[r] = hn::GetLane(hn::SumOfLanes(d, hn::Add(a[r], b[r])));
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#endif
