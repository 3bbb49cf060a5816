// How memory is read: which lines of a weight side by side, and when what follows is fetched.
#if defined(LAROSA_READING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LAROSA_READING_INL_H_
#undef LAROSA_READING_INL_H_
#else
#define LAROSA_READING_INL_H_
#endif

#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace larosa {
namespace HWY_NAMESPACE {

constexpr int64_t kLine = 64;  // bytes of a cache line

// The hardware cannot guess where a kept channel begins, so while some are multiplied what follows is
// fetched. None of it changes a bit of a result.

/// Most machines. On Zen 4, one thread, bf16 8192 → 2048: 85 % of the read bandwidth without fetching, 97 %
/// so; fetching into the first level, which has few line buffers, is slower than not fetching. 4 or 16
/// channels side by side are slower than 8.
struct AnyReading {
  static constexpr int64_t kChannels = 8;                       // side by side, 16 and 32 bits
  static constexpr int64_t level_channels(DType) { return 8; }  // … 8 and 4 bits
  static constexpr int64_t kOutputs = 4096;                     // per pass; accumulators of 16 KiB
  // Whole lines are one stream each; cut into passes of 4096 outputs, 11008 → 4096 at 4 bits went from 19 to
  // 13 GB/s a thread, though the sums of 16384 outputs no longer fit into the first-level cache.
  static constexpr int64_t quantised_outputs(DType) { return 16384; }
  /// Bytes between what is multiplied and what is fetched, of each of the channels (and rows) side by side
  /// and, all in all, of a stream; here whole lines.
  static constexpr int64_t near(DType) { return int64_t{1} << 40; }
  static constexpr int64_t ahead(DType t) { return near(t); }
  /// Whether channels that follow one another, lines of so many bytes, are read as one stream.
  static constexpr bool streams(DType, int64_t /*line*/) { return false; }
  /// Whether quantised channels are fetched a group of channels earlier, too.
  static constexpr bool twice(DType) { return false; }
  /// Fetches a cache line, which may lie behind the weight: nothing reads it.
  static HWY_INLINE void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }
  /// Whether quantised channels are fetched between the products of a pair, or when the sums of all pairs are
  /// stored: so half of the channels of 2048 outputs at 8 bits come at 29 instead of 26 of 46 GB/s with AVX2.
  static constexpr bool kBetween = false;
  /// Sums that are made before what is fetched next.
  static HWY_INLINE void hold(Floats&, Floats&) {}
  /// Whether the quantised channels side by side are dealt out from all over a block, so that each place
  /// follows a run of its own, or are neighbours.
  static constexpr bool kDeals = false;
  /// Rows side by side. Row after row is one stream of memory: on Zen 4 99 % of the read bandwidth, where
  /// four side by side, not fetched, reach 70 %.
  static constexpr int64_t kRows = 1;
};

#if HWY_TARGET == HWY_AVX3_DL
/// Zen 5, whose fetches are dropped when they come faster than memory delivers, into the second-level cache
/// more often than into the first (48 KiB). So they go into the first, late, and stay where they are written,
/// between the products: left to the compiler, who gathers them, dense 8-bit products of 4096 outputs read 2
/// to 3 points less of the bandwidth, 16-bit ones 1 to 4 (50 GB/s). Channels that follow one another are one
/// stream, which the hardware follows too: 16-bit lines of 4 and 8 KB one at a time at 96 to 100 % (six at a
/// time 87), quantised ones in pairs. Others are fetched 1 KB before they are multiplied, 768 bytes at 8
/// bits: half of the channels of 2048 to 14336 outputs come at 81 to 96 % of the read bandwidth at 16 bits
/// (79 to 91 % fetched a channel ahead). At 4 bits, where lines are shortest, they come one group of channels
/// ahead and two ahead. 16-bit lines are whole: halves of 14336 outputs are 6 points slower, though sums no
/// longer fit beside them (docs/results.md).
struct Zen5Reading {
  static constexpr int64_t kChannels = 6;
  // Of 11008 outputs at 8 bits, whose sums leave the first level, 8 side by side read 85 and 77 % of 48 and
  // 72 GB/s where 4 read 79 and 65; at 4 bits 8 read 56 % of 72 where 4 read 63.
  static constexpr int64_t level_channels(DType t) { return t == DType::int4 ? 4 : 8; }
  static constexpr int64_t kOutputs = 16384;
  // 8192 outputs at 4 bits, half of the channels: with sums of 16 KiB 1.08 times as fast as with 32; at 8
  // bits whole lines, dense, 1.05 times.
  static constexpr int64_t quantised_outputs(DType t) { return t == DType::int4 ? 4096 : 16384; }
  static constexpr int64_t near(DType t) {
    return t == DType::int4 ? 2048 : t == DType::int8 ? 768 : 1024;  // 2048: all of a pass
  }
  static constexpr int64_t ahead(DType t) { return t == DType::int4 ? 9216 : 6144; }
  static constexpr bool streams(DType t, int64_t line) {
    return line <= 8192 && (quantised(t) || line >= 4096);
  }
  static constexpr bool twice(DType t) { return t == DType::int4; }
  static HWY_INLINE void fetch(const void* line) {
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(line)));
  }
  static constexpr bool kBetween = true;
  static HWY_INLINE void hold(Floats& a, Floats& b) { asm volatile("" : "+v"(a.raw), "+v"(b.raw)); }
  static constexpr bool kDeals = false;
  static constexpr int64_t kRows = 1;
};

/// Intel's servers, whose core follows one stream at 8 to 10 GB/s where it reads 15 to 19 of eight (Emerald
/// Rapids, 2 cores of a shared host, 28 to 38 GB/s). So eight lines stand side by side whatever they are,
/// each fetched 1 KB ahead, into the first level: 16-bit channels of 4 KB and more come at 94 to 107 % of
/// what reading alone makes of them, half of them at 83 to 104 (fetched whole lines ahead, into the second
/// level, 79 to 95 and 72 to 86). 512 bytes and 1.5 KB are level, 2 KB and 6 channels slower. Quantised
/// channels and rows, whose order changes no bit, follow runs of their own: dense ones of 1 to 4 KB 1.07
/// to 1.16 times as fast as neighbours, a head of 2048 inputs at 16 and 8 bits 1.1 to 1.2 times.
/// What it has from Zen 5 was tried here: passes of 4096 16-bit outputs read up to 6 points less, fetches
/// when the sums of all pairs are stored take the same.
struct IntelReading : Zen5Reading {
  static constexpr int64_t kChannels = 8;
  static constexpr int64_t level_channels(DType) { return 8; }
  static constexpr int64_t quantised_outputs(DType) { return 16384; }
  static constexpr int64_t near(DType) { return 1024; }
  static constexpr int64_t ahead(DType t) { return near(t); }
  static constexpr bool streams(DType, int64_t) { return false; }
  static constexpr bool twice(DType) { return false; }
  static constexpr bool kDeals = true;
  static constexpr int64_t kRows = 8;
};
#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace larosa
HWY_AFTER_NAMESPACE();

#endif
