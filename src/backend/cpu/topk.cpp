// Exact selection of the largest entries. Non-negative floats order like their bits, so an entry's key is an
// integer. A sample of the row brackets the cut; one pass over the row counts what lies above the bracket and
// collects what lies in it, an eighth of the row; bisection finds the cut there. Keys are made again where
// they are needed, which costs less than to store them. One more pass takes what is kept.
// Zen 4, one thread, half of 4096 / 14336 scaled entries: 2.2 / 6.2 µs, of which the bracket 0.4, the pass
// 0.5 / 1.7, the cut 0.4 / 0.6, the lists 0.9 / 3. Bisection of the whole row took 3.3 / 9.7. Not tried: a
// radix histogram, whose increments cannot be vectorised; at one a cycle they cost more than the pass does.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/topk.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include <cmath>
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

constexpr int32_t kNan = 0x7f800001;  // key of every NaN, one above infinity's

HWY_INLINE Ints key_of(const float* x, const float* scale, int64_t left) {
  const FloatTag d;
  Floats v = load_part(d, x, left);
  if (scale) v = hn::Mul(v, load_part(d, scale, left));
  // The bits of |NaN| may be any above infinity's; NaNs must tie among themselves.
  return hn::Min(hn::BitCast(IntTag(), hn::Abs(v)), hn::Set(IntTag(), kNan));
}

/// Keys from above `below` ≥ 0 up to `top`. Zeros that pad a row are never among them.
struct Bracket {
  int32_t below, top;
};

/// Numbers of keys[0, n), n whole vectors, above both ends of a bracket. Counted in vectors: GCC 12.2 at -O3
/// joins two sums of CountTrue into one vector wrongly on AVX-512.
struct Above {
  int64_t below, top;
};
HWY_INLINE Above count_above(const int32_t* keys, int64_t n, Bracket bracket) {
  const IntTag di;
  const Ints below = hn::Set(di, bracket.below), top = hn::Set(di, bracket.top);
  Ints from_below = hn::Zero(di), from_top = hn::Zero(di);
  for (int64_t i = 0; i < n; i += lanes()) {
    const Ints v = hn::LoadU(di, keys + i);
    from_below = hn::Sub(from_below, hn::VecFromMask(di, hn::Gt(v, below)));
    from_top = hn::Sub(from_top, hn::VecFromMask(di, hn::Gt(v, top)));
  }
  return {hn::GetLane(hn::SumOfLanes(di, from_below)), hn::GetLane(hn::SumOfLanes(di, from_top))};
}

/// The keys of next(i), a vector from i on, i < n, that lie inside the bracket go to `to`, which may be where
/// they come from, padded with zeros to a whole vector. Returns their number; `above`: of keys above the
/// bracket.
template <class Next>
HWY_INLINE int64_t collect(int64_t n, Bracket bracket, const Next& next, int32_t* to, int64_t& above) {
  const IntTag di;
  const Ints below = hn::Set(di, bracket.below), top = hn::Set(di, bracket.top);
  Ints over = hn::Zero(di);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += lanes()) {
    const Ints v = next(i);
    const auto high = hn::Gt(v, top);
    const auto in = hn::AndNot(high, hn::Gt(v, below));
    hn::StoreU(hn::Compress(v, in), di, to + found);
    found += static_cast<int64_t>(hn::CountTrue(di, in));
    over = hn::Sub(over, hn::VecFromMask(di, high));
  }
  hn::StoreU(hn::Zero(di), di, to + found);
  above = hn::GetLane(hn::SumOfLanes(di, over));
  return found;
}

HWY_INLINE int64_t whole(int64_t n) {
  return (n + lanes() - 1) / lanes() * lanes();
}

/// The cut that leaves `keep` of keys[0, n), all inside the bracket and padded with zeros; 0 < keep ≤ n.
/// Clobbers the keys.
Cut narrow(int32_t* keys, int64_t n, int64_t keep, Bracket b) {
  const auto from_keys = [&](int64_t i) HWY_ATTR { return hn::LoadU(IntTag(), keys + i); };
  // Always: fewer than keep keys are above top, at least keep are above below. The keys of a narrow bracket
  // lie evenly, so three standard deviations around the expected place leave few of them. Rows that do not
  // oblige are left to the bisection.
  for (int round = 0; round < 4 && n > 64; ++round) {
    const float span = static_cast<float>(b.top - b.below), count = static_cast<float>(n);
    const float place = span * static_cast<float>(n - keep) / count, margin = span * 1.5f / std::sqrt(count);
    const Bracket inner = {b.below + static_cast<int32_t>(HWY_MAX(place - margin, 0.0f)),
                           b.below + static_cast<int32_t>(HWY_MIN(place + margin + 1, span))};
    const Above above = count_above(keys, whole(n), inner);
    if (above.top >= keep) {
      b.below = inner.top;
    } else if (above.below >= keep) {
      b = inner;
    } else {
      b.top = inner.below;
    }
    int64_t over = 0;
    n = collect(n, b, from_keys, keys, over);
    keep -= over;
  }
  int64_t over = 0;  // keys above top
  while (b.top - b.below > 1) {
    const int32_t middle = b.below + (b.top - b.below) / 2;
    const int64_t above = count_above(keys, whole(n), {middle, middle}).below;
    const bool higher = above >= keep;
    b = {higher ? middle : b.below, higher ? b.top : middle};
    over = higher ? over : above;
  }
  return {b.top, keep - over};
}

/// A bracket that holds the cut nearly always, from 256 entries: their quantiles err by 3 % of the row (one
/// standard deviation), and the bracket is 2.5 times that to either side.
Bracket guess(const float* x, const float* scale, int64_t n, int64_t keep) {
  constexpr int64_t kSample = 256, kMargin = 20;
  constexpr int32_t kFine = 1 << 17;  // 1.5 % of a key's value
  HWY_ALIGN int32_t sample[kSample];
  const IntTag di;
  const int64_t vectors = kSample / lanes();
  for (int64_t s = 0; s < vectors; ++s) {
    const int64_t i = s * (n / vectors);
    hn::Store(key_of(x + i, scale ? scale + i : nullptr, lanes()), di, sample + s * lanes());
  }
  // Above the lower end lie rank + margin of the sample, above the upper one rank − margin. Both are searched
  // side by side: counting waits for its own result otherwise.
  const int64_t rank = keep * kSample / n;
  int32_t below = 0, top = kNan, below_high = kNan, top_low = 0;
  while (below_high - below > kFine || top - top_low > kFine) {
    const Bracket middle = {below + (below_high - below) / 2, top_low + (top - top_low) / 2};
    const Above above = count_above(sample, kSample, middle);
    if (above.below >= rank + kMargin) {
      below = middle.below;
    } else {
      below_high = middle.below;
    }
    if (above.top < rank - kMargin) {
      top = middle.top;
    } else {
      top_low = middle.top;
    }
  }
  return {below, top};
}

Cut find_cut(const float* x, const float* scale, int64_t n, int64_t keep, int32_t* work) {
  constexpr int64_t kShort = 1024;
  Bracket b = n < kShort ? Bracket{0, kNan} : guess(x, scale, n, keep);
  for (;;) {
    int64_t above = 0;
    const auto row = [&](int64_t i) HWY_ATTR { return key_of(x + i, scale ? scale + i : nullptr, n - i); };
    const int64_t found = collect(n, b, row, work, above);
    if (above >= keep) {
      b = {b.top, kNan};
    } else if (above + found >= keep) {
      return narrow(work, found, keep - above, b);
    } else if (b.below == 0) {
      return {0, keep - above - found};
    } else {
      b = {0, b.below};
    }
  }
}

/// Which lanes of v are kept; takes the first `ties` of those that equal the cut.
HWY_INLINE hn::Mask<IntTag> kept_lanes(Ints v, int64_t left, int32_t key, int64_t& ties) {
  const IntTag di;
  const Ints cut = hn::Set(di, key);
  auto over = hn::Gt(v, cut), equal = hn::Eq(v, cut);
  if (left < lanes()) {
    const auto inside = hn::FirstN(di, static_cast<size_t>(left));
    over = hn::And(over, inside);
    equal = hn::And(equal, inside);
  }
  if (hn::AllFalse(di, equal)) return over;
  const int64_t count = static_cast<int64_t>(hn::CountTrue(di, equal));
  if (count <= ties) {
    ties -= count;
    return hn::Or(over, equal);
  }
  HWY_ALIGN int32_t flag[hn::MaxLanes(IntTag())];
  hn::Store(hn::IfThenElseZero(equal, hn::Set(di, 1)), di, flag);
  for (int64_t s = 0; s < lanes(); ++s) {
    if (flag[s] && ties-- <= 0) {
      flag[s] = 0;
      ties = 0;
    }
  }
  return hn::Or(over, hn::Gt(hn::Load(di, flag), hn::Zero(di)));
}

int64_t take_list(const float* x, const float* scale, int64_t n, Cut cut, ChannelList& list) {
  const FloatTag d;
  const IntTag di;
  const Ints step = hn::Set(di, static_cast<int32_t>(lanes()));
  Ints at =
      hn::Iota(di, 0);  // stepped by hand: GCC builds an Iota of a variable through memory, 30 cycles each
  int64_t kept = 0, ties = cut.ties;
  list.count = 0;
  for (int64_t i = 0; i < n; i += lanes(), at = hn::Add(at, step)) {
    const auto in = kept_lanes(key_of(x + i, scale ? scale + i : nullptr, n - i), n - i, cut.key, ties);
    const Floats v = load_part(d, x + i, n - i);
    const auto listed = hn::AndNot(hn::RebindMask(di, hn::Eq(v, hn::Zero(d))), in);
    hn::StoreU(hn::Compress(at, listed), di, list.index + list.count);
    hn::StoreU(hn::Compress(v, hn::RebindMask(d, listed)), d, list.value + list.count);
    kept += static_cast<int64_t>(hn::CountTrue(di, in));
    list.count += static_cast<int64_t>(hn::CountTrue(di, listed));
  }
  return kept;
}

int64_t take_masked(const float* x, const float* scale, int64_t n, Cut cut, float* y) {
  const FloatTag d;
  const IntTag di;
  int64_t kept = 0, ties = cut.ties;
  for (int64_t i = 0; i < n; i += lanes()) {
    const auto in = kept_lanes(key_of(x + i, scale ? scale + i : nullptr, n - i), n - i, cut.key, ties);
    const Floats v = load_part(d, x + i, n - i);
    store_part(hn::IfThenElseZero(hn::RebindMask(d, in), v), d, y + i, n - i);
    kept += static_cast<int64_t>(hn::CountTrue(di, in));
  }
  return kept;
}

}  // namespace

void fill_topk(Kernels& kernels) {
  kernels.find_cut = find_cut;
  kernels.take_list = take_list;
  kernels.take_masked = take_masked;
}

}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace larosa {
HWY_EXPORT(fill_topk);
void fill_topk(Kernels& kernels) {
  HWY_DYNAMIC_DISPATCH(fill_topk)(kernels);
}
}  // namespace larosa
#endif
