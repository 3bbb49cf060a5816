// One row times a weight, bound by memory. Channels layout: several channels per pass over the outputs, whose
// accumulators stay in the first-level cache; every output is one chain of multiply-adds per ChannelList, in
// its order, so that leaving out a zero channel changes no bit and threads may cut the outputs anywhere. Rows
// layout: dot products. Quantised lines are widened in registers: their bytes are what memory is asked for.
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

// -- quantised lines: what each of `Count` channels adds to a block of 128 outputs
// ------------------------------

/// Eight accumulators: what the registers of every target hold beside operands.
struct Accumulators {
  Floats a0, a1, a2, a3, a4, a5, a6, a7;

  static HWY_INLINE Accumulators load(const float* p, int64_t step) {
    const FloatTag d;
    return {hn::LoadU(d, p),
            hn::LoadU(d, p + step),
            hn::LoadU(d, p + 2 * step),
            hn::LoadU(d, p + 3 * step),
            hn::LoadU(d, p + 4 * step),
            hn::LoadU(d, p + 5 * step),
            hn::LoadU(d, p + 6 * step),
            hn::LoadU(d, p + 7 * step)};
  }
  HWY_INLINE void store(float* p, int64_t step) const {
    const FloatTag d;
    hn::StoreU(a0, d, p);
    hn::StoreU(a1, d, p + step);
    hn::StoreU(a2, d, p + 2 * step);
    hn::StoreU(a3, d, p + 3 * step);
    hn::StoreU(a4, d, p + 4 * step);
    hn::StoreU(a5, d, p + 5 * step);
    hn::StoreU(a6, d, p + 6 * step);
    hn::StoreU(a7, d, p + 7 * step);
  }
};

struct Int8 {
  static constexpr DType kType = DType::int8;
  static constexpr int64_t kGroups = 1, kBytes = kQuantBlock;  // of a block
  static constexpr float kFactor = 1, kOffset = 0;

  template <int64_t Count>
  static HWY_INLINE void add_block(const std::byte* const* w, const float* const* multiplier, int64_t block,
                                   float* acc) {
    const FloatTag d;
    for (int64_t part = 0; part < kQuantBlock; part += 8 * lanes()) {
      Accumulators a = Accumulators::load(acc + part, lanes());
      for (int64_t c = 0; c < Count; ++c) {
        const Floats m = hn::Set(d, multiplier[c][block]);
        const std::byte* q = w[c] + block * kBytes + part;
        a.a0 = hn::MulAdd(m, widen_int8(q), a.a0);
        a.a1 = hn::MulAdd(m, widen_int8(q + lanes()), a.a1);
        a.a2 = hn::MulAdd(m, widen_int8(q + 2 * lanes()), a.a2);
        a.a3 = hn::MulAdd(m, widen_int8(q + 3 * lanes()), a.a3);
        a.a4 = hn::MulAdd(m, widen_int8(q + 4 * lanes()), a.a4);
        a.a5 = hn::MulAdd(m, widen_int8(q + 5 * lanes()), a.a5);
        a.a6 = hn::MulAdd(m, widen_int8(q + 6 * lanes()), a.a6);
        a.a7 = hn::MulAdd(m, widen_int8(q + 7 * lanes()), a.a7);
      }
      a.store(acc + part, lanes());
    }
  }
};

/// A nibble becomes the top of a mantissa: 1 + (q + 8) / 16, one shift and one and-or instead of a widening,
/// a conversion and a subtraction. With multipliers 16 times as large that is 24 + q, and 24 multipliers are
/// taken off per group at the end.
struct Int4 {
  static constexpr DType kType = DType::int4;
  static constexpr int64_t kGroups = 4, kBytes = kQuantBlock / 2;
  static constexpr float kFactor = 16, kOffset = -1.5f;  // 24 / 16

  template <int kShift>
  static HWY_INLINE Floats level(hn::Vec<WordTag> words) {
    const WordTag d32;
    constexpr int kUp = 19 - kShift;  // to bit 19
    const auto placed = [&] {
      if constexpr (kUp >= 0) {
        return hn::ShiftLeft<kUp>(words);
      } else {
        return hn::ShiftRight<-kUp>(words);
      }
    }();
    return hn::BitCast(FloatTag(), hn::OrAnd(hn::Set(d32, 0x3f800000u), placed, hn::Set(d32, 0x00780000u)));
  }

  template <int64_t Count>
  static HWY_INLINE void add_block(const std::byte* const* w, const float* const* multiplier, int64_t block,
                                   float* acc) {
    const FloatTag d;
    for (int64_t part = 0; part < 16; part += lanes()) {
      Accumulators a = Accumulators::load(acc + part, 16);
      for (int64_t c = 0; c < Count; ++c) {
        const auto words = load_words(w[c] + block * kBytes + part * 4);
        const float* m = multiplier[c] + block * kGroups;
        const Floats m0 = hn::Set(d, m[0]), m1 = hn::Set(d, m[1]), m2 = hn::Set(d, m[2]),
                     m3 = hn::Set(d, m[3]);
        a.a0 = hn::MulAdd(m0, level<0>(words), a.a0);
        a.a1 = hn::MulAdd(m0, level<4>(words), a.a1);
        a.a2 = hn::MulAdd(m1, level<8>(words), a.a2);
        a.a3 = hn::MulAdd(m1, level<12>(words), a.a3);
        a.a4 = hn::MulAdd(m2, level<16>(words), a.a4);
        a.a5 = hn::MulAdd(m2, level<20>(words), a.a5);
        a.a6 = hn::MulAdd(m3, level<24>(words), a.a6);
        a.a7 = hn::MulAdd(m3, level<28>(words), a.a7);
      }
      a.store(acc + part, 16);
    }
  }
};

/// One pass of quantised channels over outputs [first, first + 128 · blocks).
template <class Format>
class QuantisedPass {
 public:
  QuantisedPass(const Weight& weight, int64_t first, int64_t blocks, float* acc)
      : weight_(weight),
        bytes_(weight.line_bytes()),
        value_offset_(first / kQuantBlock * Format::kBytes),
        scale_offset_(scales_offset(Format::kType, weight.out) + first / kQuantBlock * Format::kGroups * 2),
        blocks_(blocks),
        acc_(acc) {}

  void run(const int32_t* index, const float* value, int64_t count) {
    const int64_t groups = blocks_ * Format::kGroups;
    std::fill_n(acc_, blocks_ * kQuantBlock, 0.0f);
    std::fill_n(taken_off_, groups, 0.0f);
    int64_t c = 0;
    for (; c + kChannels <= count; c += kChannels) {
      const int64_t left = std::min(count - c - kChannels, kChannels);
      batch<kChannels>(index + c, value + c, index + c + kChannels, left);
    }
    for (; c < count; ++c) batch<1>(index + c, value + c, nullptr, 0);
    if (Format::kOffset == 0) return;
    const FloatTag d;
    constexpr int64_t kGroup = kQuantBlock / Format::kGroups;
    for (int64_t g = 0; g < groups; ++g) {
      const Floats off = hn::Set(d, taken_off_[g]);
      for (int64_t j = g * kGroup; j < (g + 1) * kGroup; j += lanes())
        hn::StoreU(hn::Add(hn::LoadU(d, acc_ + j), off), d, acc_ + j);
    }
  }

 private:
  /// `Count` channels; `next`, those of the following batch, are fetched meanwhile (see add_channels).
  template <int64_t Count>
  HWY_INLINE void batch(const int32_t* index, const float* value, const int32_t* next, int64_t next_count) {
    const auto* base = static_cast<const std::byte*>(weight_.data);
    const std::byte *w[Count], *ahead[Count];
    const float* multiplier[Count];
    for (int64_t s = 0; s < Count; ++s) {
      w[s] = base + index[s] * bytes_ + value_offset_;
      ahead[s] = next_count > 0 ? base + next[std::min(s, next_count - 1)] * bytes_ : nullptr;
      multiplier[s] = multiply_scales(base + index[s] * bytes_ + scale_offset_, value[s], multipliers_[s]);
    }
    constexpr int64_t kLine = 64;
    for (int64_t b = 0; b < blocks_; ++b) {
      if (next_count > 0) {
        for (int64_t s = 0; s < Count; ++s) {
          for (int64_t byte = 0; byte < Format::kBytes; byte += kLine)
            __builtin_prefetch(ahead[s] + value_offset_ + b * Format::kBytes + byte, 0, 2);
          if (b * Format::kGroups * 2 % kLine == 0)
            __builtin_prefetch(ahead[s] + scale_offset_ + b * Format::kGroups * 2, 0, 2);
        }
      }
      Format::template add_block<Count>(w, multiplier, b, acc_ + b * kQuantBlock);
    }
  }

  /// to[g] = scale_g · value · kFactor; what every group must lose at the end is added up.
  HWY_INLINE const float* multiply_scales(const std::byte* scales, float value, float* to) {
    const FloatTag d;
    const Floats v = hn::Set(d, value * Format::kFactor), offset = hn::Set(d, Format::kOffset);
    const int64_t groups = blocks_ * Format::kGroups;
    for (int64_t g = 0; g < groups; g += lanes()) {
      HWY_ALIGN uint16_t half[hn::MaxLanes(FloatTag())] = {};
      std::memcpy(half, scales + 2 * g, static_cast<size_t>(std::min(lanes(), groups - g)) * 2);
      const Floats m = hn::Mul(widen_half(half), v);
      hn::Store(m, d, to + g);
      if (Format::kOffset != 0)
        hn::Store(hn::MulAdd(offset, m, hn::Load(d, taken_off_ + g)), d, taken_off_ + g);
    }
    return to;
  }

  static constexpr int64_t kMostGroups = kOutputs / kQuantBlock * Format::kGroups;
  const Weight& weight_;
  const int64_t bytes_, value_offset_, scale_offset_, blocks_;
  float* const acc_;
  HWY_ALIGN float taken_off_[kMostGroups];
  HWY_ALIGN float multipliers_[kChannels][kMostGroups];
};

template <class Format>
void chain_quantised(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                     int64_t end, float* part) {
  const int64_t blocks = (end - begin + kQuantBlock - 1) / kQuantBlock;
  constexpr int64_t kMost = kOutputs / kQuantBlock;
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

/// Parts are in Pair order (bf16: EvenOdd) or as they come.
template <bool EvenOdd>
HWY_INLINE void join_as(const float* even, const float* odd, const float* bias, bool accumulate, int64_t n,
                        float* y) {
  const FloatTag d;
  const int64_t step = 2 * lanes();
  HWY_ALIGN float ordered[2 * hn::MaxLanes(FloatTag())];
  for (int64_t j = 0; j < n; j += step) {
    const Floats a = hn::Add(hn::Load(d, even + j), hn::Load(d, odd + j));
    const Floats b = hn::Add(hn::Load(d, even + j + lanes()), hn::Load(d, odd + j + lanes()));
    if (EvenOdd) {
      hn::StoreInterleaved2(a, b, d, ordered);
    } else {
      hn::Store(a, d, ordered);
      hn::Store(b, d, ordered + lanes());
    }
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
  const bool even_odd = w.dtype == DType::bf16;
  (even_odd ? join_as<true> : join_as<false>)(even, odd, bias, accumulate, end - begin, y + begin);
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

}  // namespace

void fill_gemv(Kernels& kernels) {
  kernels.gemv_chain = gemv_chain;
  kernels.gemv_join = gemv_join;
  kernels.gemv_rows = gemv_rows;
  kernels.pack_input = pack_input;
  kernels.packed_size = packed_size;
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
