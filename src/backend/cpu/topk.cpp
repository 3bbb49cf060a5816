// Exact selection of the largest entries. Non-negative floats order like their bits, so the cut is found by
// bisection over integers: one vectorised count per step, over a set that is narrowed to the entries still in
// doubt as soon as these are few. Some ten passes over the row, a few microseconds for 14336 entries.
// Compress and a full store, not CompressStore: the compressing store is microcode on Zen 4.
#include "backend/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/topk.cpp"
#include "hwy/foreach_target.h"
// Highway's loop over the targets must come first.
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE Ints key_of(Floats x, Floats scale) {
  const IntTag di;
  // The bits of |NaN| may be any above infinity's; NaNs must tie among themselves.
  const Ints bits = hn::BitCast(di, hn::Abs(hn::Mul(hn::Abs(x), scale)));
  return hn::IfThenElse(hn::Gt(bits, hn::Set(di, 0x7f800000)), hn::Set(di, 0x7fffffff), bits);
}

void make_keys(const float* x, const float* scale, int64_t n, int32_t* keys) {
  const FloatTag d;
  const IntTag di;
  for (int64_t i = 0; i < n; i += lanes()) {
    const Floats s = scale ? load_part(d, scale + i, n - i) : hn::Set(d, 1.0f);
    store_part(key_of(load_part(d, x + i, n - i), s), di, keys + i, n - i);
  }
}

/// How many of keys[0, n) are at least `least`, which is above zero (so that padding does not count).
int64_t count_from(const int32_t* keys, int64_t n, int32_t least) {
  const IntTag di;
  const Ints bound = hn::Set(di, least - 1), one = hn::Set(di, 1);
  Ints a = hn::Zero(di), b = hn::Zero(di), c = hn::Zero(di), e = hn::Zero(di);
  int64_t i = 0;
  for (; i + 4 * lanes() <= n; i += 4 * lanes()) {
    a = hn::Add(a, hn::IfThenElseZero(hn::Gt(hn::LoadU(di, keys + i), bound), one));
    b = hn::Add(b, hn::IfThenElseZero(hn::Gt(hn::LoadU(di, keys + i + lanes()), bound), one));
    c = hn::Add(c, hn::IfThenElseZero(hn::Gt(hn::LoadU(di, keys + i + 2 * lanes()), bound), one));
    e = hn::Add(e, hn::IfThenElseZero(hn::Gt(hn::LoadU(di, keys + i + 3 * lanes()), bound), one));
  }
  for (; i < n; i += lanes())
    a = hn::Add(a, hn::IfThenElseZero(hn::Gt(load_part(di, keys + i, n - i), bound), one));
  return hn::GetLane(hn::SumOfLanes(di, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

int32_t largest(const int32_t* keys, int64_t n) {
  const IntTag di;
  Ints m = hn::Zero(di);
  for (int64_t i = 0; i < n; i += lanes()) m = hn::Max(m, load_part(di, keys + i, n - i));
  return hn::GetLane(hn::MaxOfLanes(di, m));
}

/// The keys in [low, high), low > 0; `to` may be `from`.
int64_t narrow_to(const int32_t* from, int64_t n, int32_t low, int32_t high, int32_t* to) {
  const IntTag di;
  const Ints above = hn::Set(di, low - 1), below = hn::Set(di, high);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += lanes()) {
    const Ints v = load_part(di, from + i, n - i);
    const auto in = hn::And(hn::Gt(v, above), hn::Lt(v, below));
    hn::StoreU(hn::Compress(v, in), di, to + kept);
    kept += static_cast<int64_t>(hn::CountTrue(di, in));
  }
  return kept;
}

/// Bisection for the cut. The first two probes are `probe`, where these lie between the bounds.
Cut bisect(const int32_t* keys, int64_t n, int64_t keep, const int64_t (&probe)[2], int32_t* work) {
  // Always: from_low ≥ keep keys are ≥ low, more < keep keys are ≥ high. The set [active, +set) holds every
  // key of [low, high); `dropped` keys ≥ high are no longer in it. Zeros of a vector's tail count as below
  // every bound.
  int64_t low = 0, high = int64_t{largest(keys, n)} + 1, more = 0, from_low = n, set = n, dropped = 0;
  const int32_t* active = keys;
  for (int step = 0; high - low > 1; ++step) {
    int64_t middle = low + (high - low) / 2;
    if (step < 2 && probe[step] > low && probe[step] < high) middle = probe[step];
    const int64_t count = dropped + count_from(active, set, static_cast<int32_t>(middle));
    if (count >= keep) {
      low = middle;
      from_low = count;
    } else {
      high = middle;
      more = count;
    }
    if (low > 0 && high - low > 1 && (from_low - more) * 2 < set && high <= 0x7fffffff) {
      set = narrow_to(active, set, static_cast<int32_t>(low), static_cast<int32_t>(high), work);
      active = work;
      dropped = more;
    }
  }
  return {static_cast<int32_t>(low), keep - more};
}

Cut find_cut(const int32_t* keys, int64_t n, int64_t keep, int32_t* work) {
  constexpr int64_t kSample = 256, kQuarter = 1 << 21;  // key distance of a quarter of an octave
  int64_t probe[2] = {0, 0};
  if (n >= 8 * kSample) {
    // A quantile of 256 entries errs by 3 %: a quarter of an octave on either side holds the cut nearly
    // always, and a fifth of the row. A wrong guess costs two passes.
    HWY_ALIGN int32_t sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = keys[i * n / kSample];
    const int64_t rank = HWY_MAX(int64_t{1}, keep * kSample / n);
    const int64_t guess = bisect(sample, kSample, rank, probe, work).key;
    probe[0] = guess - kQuarter;
    probe[1] = guess + kQuarter;
  }
  return bisect(keys, n, keep, probe, work);
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

void take_lists(const float* x, const int32_t* keys, int64_t n, Cut cut, ChannelList* lists) {
  const FloatTag d;
  const IntTag di;
  const Ints step = hn::Set(di, static_cast<int32_t>(lanes()));
  Ints at =
      hn::Iota(di, 0);  // stepped by hand: GCC builds an Iota of a variable through memory, 30 cycles each
  int64_t count[kChains] = {}, ties = cut.ties;
  for (int64_t i = 0; i < n; i += lanes(), at = hn::Add(at, step)) {
    const auto in = kept_lanes(load_part(di, keys + i, n - i), n - i, cut.key, ties);
    const Floats v = load_part(d, x + i, n - i);
    const int64_t chain = chain_of(i);
    hn::StoreU(hn::Compress(at, in), di, lists[chain].index + count[chain]);
    hn::StoreU(hn::Compress(v, hn::RebindMask(d, in)), d, lists[chain].value + count[chain]);
    count[chain] += static_cast<int64_t>(hn::CountTrue(di, in));
  }
  for (int64_t c = 0; c < kChains; ++c) lists[c].count = count[c];
}

int64_t take_masked(const float* x, const int32_t* keys, int64_t n, Cut cut, float* y) {
  const FloatTag d;
  const IntTag di;
  int64_t kept = 0, ties = cut.ties;
  for (int64_t i = 0; i < n; i += lanes()) {
    const auto in = kept_lanes(load_part(di, keys + i, n - i), n - i, cut.key, ties);
    const Floats v = load_part(d, x + i, n - i);
    store_part(hn::IfThenElseZero(hn::RebindMask(d, in), v), d, y + i, n - i);
    kept += static_cast<int64_t>(hn::CountTrue(di, in));
  }
  return kept;
}

}  // namespace

void fill_topk(Kernels& kernels) {
  kernels.make_keys = make_keys;
  kernels.find_cut = find_cut;
  kernels.take_lists = take_lists;
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
