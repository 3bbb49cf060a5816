// Selection inside one block: which entries of a row count, and a list of a share of them in the order of the
// index. Every product's blocks do this for themselves: a launch of its own costs as much and the launch on
// top.
//
// The cut is looked for around that of the token before, in bins (cut_near). Where it is not there, or
// nothing is known of one, the keys above two guesses are counted at once, and guesses interpolated
// (find_cut).
#pragma once

#include "backend/cuda/device.cuh"
#include "backend/cuda/kernels.h"

namespace larosa::cuda {

/// Keys order like scores and are not negative; entries that are not there have kNoKey.
inline constexpr int kNanKey = 0x7fffffff, kNoKey = -1;

/// The score |x|·scale as ordered bits; a NaN is the largest.
__device__ inline int score_key(float x, const float* scale, int i) {
  float s = fabsf(x);
  if (scale) s = __fmul_rn(s, scale[i]);
  return isnan(s) ? kNanKey : __float_as_int(s);
}

/// Entries with a key above `key` are kept, and the first `ties` of those that have it.
struct Cut {
  int key = 0, ties = 0;
};
inline constexpr int kAllTies = 1 << 30;

/// A share of a row: every `of`-th entry, from `first` on. Blocks that share a product list their own entries
/// only, a quarter each.
struct Own {
  int first = 0, of = 1;

  __device__ int entry(int i) const { return i * of + first; }
  __device__ int count(int cols) const { return (cols - first + of - 1) / of; }
  __device__ bool has(int e) const { return e % of == first; }
};

template <int kThreads>
struct SelectScratch {
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp);
  int2 above[2][kWarps];  // count_above's, of this pass and the one before
  int warp_sum[kWarps], warp_ties[kWarps];
  float reduced[kWarps];
  int guess;
  // cut_near's, cleared before each row:
  int bin[kThreads];
  int found, rank, held;  // the bin that the cut is in, or -1; entries of it to be kept, and all
  int members, member[kWarp];
};

/// The block's own, in shared memory.
template <int kThreads>
__device__ SelectScratch<kThreads>& select_scratch() {
  return block_object<SelectScratch<kThreads>>();
}

/// Sum of the warps' values before warp `end`.
__device__ inline int before_warp(const int* sums, int end) {
  return __reduce_add_sync(~0u, lane() < end ? sums[lane()] : 0);
}

/// Entries of the row with keys above low and above high.
template <int kThreads, class Row>
__device__ int2 count_above(const Row& row, int low, int high, int2* warps) {
  constexpr int kWarps = kThreads / kWarp;
  int x = 0, y = 0;
  row.template each<4>([&](int, int key) {
    x += key > low;
    y += key > high;
  });
  x = __reduce_add_sync(~0u, x);
  y = __reduce_add_sync(~0u, y);
  if (lane() == 0) warps[warp()] = {x, y};
  __syncthreads();
  const int2 of_warp = lane() < kWarps ? warps[lane()] : int2{0, 0};
  return {__reduce_add_sync(~0u, of_warp.x), __reduce_add_sync(~0u, of_warp.y)};
}

/// The cut that keeps exactly `keep` of the row's entries, 0 < keep < cols. guess: a key near it, or 0; it
/// decides how many passes are made, not what is found.
template <int kThreads, class Row>
__device__ Cut find_cut(const Row& row, int keep, int guess) {
  auto& s = select_scratch<kThreads>();
  constexpr int kPatience = 8;        // passes before the bracket is cut in three whatever it holds
  constexpr float kOctave = 8388608;  // keys from one power of two to the next
  // More than keep entries lie above low, fewer above high; `known`: it was counted.
  int low = kNoKey, high = kNanKey, above_low = row.cols, above_high = 0;
  bool low_known = false, high_known = false;
  float step = guess > 0 ? kOctave / 32 : kOctave / 2;
  const float start = guess > 0 ? static_cast<float>(guess) : static_cast<float>(0x3f000000);
  float try_low = start - step, try_high = start + step;  // rounded to 128 keys or less: they are guesses
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    const unsigned width = static_cast<unsigned>(high) - static_cast<unsigned>(low);
    const auto inside = [&](float at) {
      const float offset = fminf(fmaxf(at, 0.0f), 2147483520.0f);
      return static_cast<unsigned>(offset);
    };
    unsigned a, b;  // offsets from low
    if (low_known && high_known) {
      const int held = above_low - above_high;
      const float share = static_cast<float>(above_low - keep) / static_cast<float>(held);
      const float keys = static_cast<float>(width);
      const float spread = fmaxf(0.35f, 0.6f * sqrtf(static_cast<float>(held) * share * (1 - share)));
      const bool thirds = held <= 3 || pass >= kPatience;
      a = thirds ? width / 3 : inside(keys * (share - spread / static_cast<float>(held)));
      b = thirds ? width - width / 3 : inside(keys * (share + spread / static_cast<float>(held)));
    } else {
      a = inside(try_low - static_cast<float>(low));
      b = inside(try_high - static_cast<float>(low));
      if (pass >= kPatience) {
        a = width / 3;
        b = width - width / 3;
      }
    }
    a = min(max(a, 1u), width - 1);
    b = min(max(b, a), width - 1);
    const int first = static_cast<int>(static_cast<unsigned>(low) + a);
    const int second = static_cast<int>(static_cast<unsigned>(low) + b);
    const int2 n = count_above<kThreads>(row, first, second, s.above[pass % 2]);
    if (n.x == keep) return {first, 0};
    if (n.y == keep) return {second, 0};
    if (n.x < keep) {
      high = first, above_high = n.x, high_known = true;
    } else if (n.y > keep) {
      low = second, above_low = n.y, low_known = true;
    } else {
      low = first, above_low = n.x, low_known = true;
      high = second, above_high = n.y, high_known = true;
    }
    if (static_cast<unsigned>(high) - static_cast<unsigned>(low) == 1) return {high, keep - above_high};
    if (low_known == high_known) continue;
    // A third of a normal row's entries lie in the octave around its median.
    step *= 4;
    const float slope = kOctave / (0.3f * static_cast<float>(row.cols));
    const float at = low_known ? static_cast<float>(low) + static_cast<float>(above_low - keep) * slope
                               : static_cast<float>(high) - static_cast<float>(keep - above_high) * slope;
    try_low = at - (low_known ? step / 4 : step);
    try_high = at + (low_known ? step : step / 4);
  }
}

/// Which entries are to be kept: by value, since through a pointer to the kernel's arguments a function that
/// is not inlined reads them from memory.
struct Rule {
  Selects select;
  int cols, keep;
  float cut;
  int32_t* guess;
  float* masked;
  int32_t* kept;
};
__device__ inline Rule rule_of(const Input& in) {
  return {in.select, in.cols, in.keep, in.cut, in.guess, in.masked, in.kept};
}

template <int kThreads>
__device__ void clear_bins() {
  auto& s = select_scratch<kThreads>();
  s.bin[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.found = -1, s.members = 0;
}

/// find_cut where the cut is within a quarter of an octave of `guess`, the cut of another row: one pass
/// counts the keys around it in bins, which one barrier and a sum over the bins turn into the bin with the
/// cut; where not all of its few members are kept, these are ranked. False: it was not there. Bins are clear.
template <int kThreads, class Row>
__device__ bool cut_near(const Row& row, int keep, int guess, Cut& cut) {
  constexpr int kShift = 13, kWarps = kThreads / kWarp;
  auto& s = select_scratch<kThreads>();
  const int low = max(guess - (kThreads << kShift) / 2, 1);
  int above = 0;
  row.each_four(Own(), [&](int, const int(&key)[4], unsigned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = key[i] - low;
      above += offset >= kThreads << kShift;
      if (offset >= 0 && offset < kThreads << kShift) atomicAdd(&s.bin[offset >> kShift], 1);
    }
  });
  above = __reduce_add_sync(~0u, above);
  if (lane() == 0) s.warp_sum[warp()] = above;
  __syncthreads();
  const int bin = kThreads - 1 - static_cast<int>(threadIdx.x);  // from the top
  const int own = s.bin[bin];
  int through = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(~0u, through, step);
    if (lane() >= step) through += before;
  }
  if (lane() == kWarp - 1) s.warp_ties[warp()] = through;
  __syncthreads();
  through += before_warp(s.warp_sum, kWarps) + before_warp(s.warp_ties, warp());
  if (through - own < keep && keep <= through) {
    s.found = bin;
    s.rank = keep - (through - own);
    s.held = own;
  }
  __syncthreads();
  if (s.found < 0 || s.held > kWarp) return false;
  const int base = low + (s.found << kShift), rank = s.rank, held = s.held;
  if (rank == held) {
    cut = {base - 1, 0};
  } else {
    row.template each<1>([&](int, int key) {
      if (static_cast<unsigned>(key - base) < 1u << kShift) s.member[atomicAdd(&s.members, 1)] = key;
    });
    __syncthreads();
    const int mine = lane() < held ? s.member[lane()] : kNoKey;
    int greater = 0, equal = 0;
#pragma unroll 1
    for (int i = 0; i < held; ++i) {
      const int other = __shfl_sync(~0u, mine, i);
      greater += other > mine;
      equal += other == mine;
    }
    const bool last = lane() < held && greater < rank && rank <= greater + equal;
    const int source = __ffs(static_cast<int>(__ballot_sync(~0u, last))) - 1;
    const int key = __shfl_sync(~0u, mine, source), ties = rank - __shfl_sync(~0u, greater, source);
    cut = ties == __shfl_sync(~0u, equal, source) ? Cut{key - 1, 0} : Cut{key, ties};
  }
  return true;
}

/// What a rule keeps of a row.
template <int kThreads, class Row>
__device__ Cut cut_of(const Row& row, const Rule& rule, int guess) {
  if (rule.select == Selects::all || (rule.select == Selects::topk && rule.keep == rule.cols))
    return {0, kAllTies};
  if (rule.select == Selects::threshold) {       // keys are the bits of non-negative floats: so is the cut
    if (!(rule.cut >= 0)) return {0, kAllTies};  // below zero, or a NaN
    return {rule.cut == 0 ? 0 : __float_as_int(rule.cut), 0};
  }
  if (rule.keep == 0) return {kNanKey, 0};
  Cut cut;
  if (guess > 0 && cut_near<kThreads>(row, rule.keep, guess, cut)) return cut;
  return find_cut<kThreads>(row, rule.keep, guess);
}

/// Entries that a rule keeps of a row, zeros too; for every thread.
template <int kThreads, class Row>
__device__ int count_kept(const Row& row, const Rule& rule, const Cut& cut) {
  if (cut.ties == kAllTies) return rule.cols;
  if (rule.select == Selects::topk) return rule.keep;
  return count_above<kThreads>(row, cut.key, kNanKey, select_scratch<kThreads>().above[0]).x;
}

/// Hands a share's kept entries to take(place, index), in the order of the index, zeros left out, and the
/// others to leave(index); returns how many were taken. Each warp has one run of the row.
template <int kThreads, class Row, class Take, class Leave>
__device__ int compact(const Row& row, const Cut& cut, const Own& own, const Take& take, const Leave& leave) {
  constexpr int kWarps = kThreads / kWarp;
  auto& s = select_scratch<kThreads>();
  const uint32_t below = (1u << lane()) - 1;
  if (cut.ties == 0) {  // a key above another is not zero, nor is its entry
    int count = 0;
    row.each_four(own, [&](int, const int(&key)[4], unsigned) {
#pragma unroll
      for (int i = 0; i < 4; ++i) count += key[i] > cut.key;
    });
    count = __reduce_add_sync(~0u, count);
    if (lane() == 0) s.warp_sum[warp()] = count;
    __syncthreads();
    const int of_warp = lane() < kWarps ? s.warp_sum[lane()] : 0;
    int place = __reduce_add_sync(~0u, lane() < warp() ? of_warp : 0);
    row.each_four(own, [&](int first, const int(&key)[4], unsigned there) {
      uint32_t mask[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) mask[i] = __ballot_sync(~0u, key[i] > cut.key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = own.entry(first + i * kWarp);
        if (key[i] > cut.key) {
          take(place + __popc(mask[i] & below), e);
        } else if (there >> i & 1) {
          leave(e);
        }
        place += __popc(mask[i]);
      }
    });
    return __reduce_add_sync(~0u, of_warp);
  }
  const bool ranked = cut.ties < kAllTies;
  int ties_before = 0;
  if (ranked) {
    int ties = 0;
    row.template each<1>([&](int, int key) { ties += __popc(__ballot_sync(~0u, key == cut.key)); });
    if (lane() == 0) s.warp_ties[warp()] = ties;
    __syncthreads();
    ties_before = before_warp(s.warp_ties, warp());
  }
  const auto each_own = [&](const auto& body) {
    int ties = ties_before;
    row.template each<1>([&](int e, int key) {
      bool kept = key > cut.key || key == cut.key;
      if (ranked) {
        const bool tie = key == cut.key;
        const uint32_t mask = __ballot_sync(~0u, tie);
        if (tie) kept = ties + __popc(mask & below) < cut.ties;
        ties += __popc(mask);
      }
      const bool here = key != kNoKey && own.has(e);
      const bool present = here && kept && __float_as_uint(row.value(e)) != 0;
      body(e, here, __ballot_sync(~0u, present), present);
    });
  };
  int count = 0;
  each_own([&](int, bool, uint32_t mask, bool) { count += __popc(mask); });
  if (lane() == 0) s.warp_sum[warp()] = count;
  __syncthreads();
  int place = before_warp(s.warp_sum, warp());
  each_own([&](int e, bool here, uint32_t mask, bool present) {
    if (present) {
      take(place + __popc(mask & below), e);
    } else if (here) {
      leave(e);
    }
    place += __popc(mask);
  });
  return before_warp(s.warp_sum, kWarps);
}

/// Entries of a thread: every warp has one run, of whole steps of 32.
template <int kThreads>
struct Run {
  int steps, first;

  __device__ explicit Run(int cols)
      : steps((cols + kThreads - 1) / kThreads), first(warp() * steps * kWarp + lane()) {}
  __device__ int entry(int step) const { return first + step * kWarp; }
};

/// use(first, four, there) of four entries of a thread at a time, numbers first, first + kWarp, … of a share:
/// what load(e) gives of them, all read before anything is written, or `none` where bit i of `there` is not
/// set, beyond the row. The compiler would not dare to read one behind another's writing, and wait for each.
template <int kThreads, class T, class Load, class Use>
__device__ void in_fours(int cols, const Own& own, T none, const Load& load, const Use& use) {
  const int count = own.count(cols);
  const Run<kThreads> run(count);
#pragma unroll 1
  for (int i = 0; i < run.steps; i += 4) {
    T four[4];
    unsigned there = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int number = run.entry(i + j);
      const bool in_row = i + j < run.steps && number < count;
      four[j] = in_row ? load(own.entry(number)) : none;
      there |= static_cast<unsigned>(in_row) << j;
    }
    use(run.entry(i), four, there);
  }
}

/// A row in memory, shared or global, of any length; its keys are made anew in every pass.
template <int kThreads>
struct MemoryRow {
  const float* x;
  const float* scale;
  int cols;

  __device__ float value(int i) const { return x[i]; }
  template <int kUnroll, class Body>
  __device__ void each(const Body& body) const {
    const Run<kThreads> run(cols);
#pragma unroll kUnroll
    for (int i = 0; i < run.steps; ++i) {
      const int e = run.entry(i);
      body(e, e < cols ? score_key(x[e], scale, e) : kNoKey);
    }
  }
  template <class Body>
  __device__ void each_four(const Own& own, const Body& body) const {
    in_fours<kThreads>(
        cols, own, kNoKey, [&](int e) { return score_key(x[e], scale, e); }, body);
  }
};

/// A row whose keys stand in memory too. In registers they would want unrolled loops, 30 to 80 KB of code for
/// each length, and no pass became faster.
template <int kThreads>
struct KeyedRow {
  const float* x;
  const int* key;
  int cols;

  __device__ float value(int i) const { return x[i]; }
  template <int kUnroll, class Body>
  __device__ void each(const Body& body) const {
    const Run<kThreads> run(cols);
#pragma unroll kUnroll
    for (int i = 0; i < run.steps; ++i) {
      const int e = run.entry(i);
      body(e, e < cols ? key[e] : kNoKey);
    }
  }
  template <class Body>
  __device__ void each_four(const Own& own, const Body& body) const {
    in_fours<kThreads>(
        cols, own, kNoKey, [&](int e) { return key[e]; }, body);
  }
};

}  // namespace larosa::cuda
