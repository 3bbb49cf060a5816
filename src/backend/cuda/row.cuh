// The row that a product reads: every block makes it for itself in shared memory, normalised and selected
// from where its input says so.
#pragma once

#include "backend/cuda/select.cuh"

namespace larosa::cuda {

/// Sum of squares of the row's entries, in one order wherever a row is normalised.
template <int kThreads, class Value>
__device__ float square_sum(const Value& value, int cols, float* reduced) {
  const Run<kThreads> run(cols);
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < run.steps; ++i) {
    const int e = run.entry(i);
    const float v = e < cols ? value(e) : 0;
    sum = fmaf(v, v, sum);
  }
  return block_reduce<kThreads>(sum, reduced, Add());
}
__device__ inline float norm_factor(float sum, int cols, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(cols)), eps)));
}
/// Starts copying a row to shared memory. Copies that pass no register are all in flight at once; loads in a
/// rolled loop were waited for one by one (11008 entries: 7.9 µs, in unrolled ones 2.6).
template <int kThreads>
__device__ void fetch_row(const float* x, int cols, float* to) {
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0 && cols % 4 == 0) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * 4; i < cols; i += kThreads * 4) fetch_vector(x + i, to + i);
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads) fetch_word(x + i, to + i);
  }
}
/// Until the row is there for every thread.
__device__ inline void wait_for_row() {
  wait_for_fetched();
  __syncthreads();
}

/// A row in shared memory, and the factor of its norm where it is to have one.
template <int kThreads>
__device__ float take_row(const Input& in, float* values) {
  fetch_row<kThreads>(in.x, in.cols, values);
  wait_for_row();
  if (in.source != Source::norm) return 1;
  const float sum =
      square_sum<kThreads>([&](int e) { return values[e]; }, in.cols, select_scratch<kThreads>().reduced);
  return norm_factor(sum, in.cols, in.eps);
}
/// The norm where the row stands.
template <int kThreads>
__device__ void norm_row(const Input& in, const float* gain, float factor, float* values) {
  const Run<kThreads> run(in.cols);
#pragma unroll 4
  for (int i = 0; i < run.steps; ++i) {
    const int e = run.entry(i);
    if (e < in.cols) values[e] = norm_entry(values[e], factor, gain, e);
  }
  __syncthreads();
}
/// Every block writes a run of a norm down where the input wants that.
template <int kThreads>
__device__ void leave_row(const Input& in, const float* values) {
  if (in.source != Source::norm || !in.values) return;
  const int begin = static_cast<int>(blockIdx.x) * in.left, end = min(begin + in.left, in.cols);
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kThreads) in.values[e] = values[e];
}

__host__ __device__ inline int padded_bytes(int cols, int size) {
  return (cols * size + 15) / 16 * 16;
}
/// Bytes of the longest list of a block's own channels: numbers and values.
__host__ __device__ inline int list_bytes(int cols) {
  return 2 * padded_bytes((cols + kGroup - 1) / kGroup, 4);
}

/// A block's own channels: all of them, whose values stand kGroup floats apart, or those of a list.
struct Channels {
  bool all;
  int near, value;  // offsets in the block's memory: the list's numbers; values
  int count;
};

/// Where a product's block has what: offsets in its memory. Gain and score weights are there before the row
/// is (of the first tile); keys take the place of the weights; a row is followed by its list.
struct RowMemory {
  int gain, keys, row;  // or -1; row: the list is made from where the row stands
  int list, end;
  bool scaled;  // keys begin as score weights
};
/// held: the row fits; one that does not stands ready, and only its list is made.
__host__ __device__ inline RowMemory row_memory(const Input& in, int at, bool held) {
  RowMemory m{-1, -1, -1, at, 0, held && in.scale};
  if (held && in.source == Source::norm && in.gain) {
    m.gain = m.list;
    m.list += padded_bytes(in.cols, 4);
  }
  if (held && (in.scale || in.select != Selects::all)) {
    m.keys = m.list;
    m.list += padded_bytes(in.cols, 4);
  }
  if (held) {
    m.row = m.list;
    m.list += padded_bytes(in.cols, 4);
  }
  const int list = list_bytes(in.cols);
  m.end =
      m.list + (held && in.select == Selects::topk && list < kBinBytes ? kBinBytes : list);  // bins before
  return m;
}
/// Where sums can stand, once row and list have been read.
__host__ __device__ inline int sums_at(const RowMemory& m) {
  return m.row < 0 ? m.list : m.row;
}
__device__ inline float* floats_at(int offset) {
  return offset < 0 ? nullptr : reinterpret_cast<float*>(block_memory() + offset);
}

/// Lists what counts of a block's own channels; the first group of blocks writes the selection down.
template <int kThreads, class Row>
__device__ int choose(const Row& row, const Cut& cut, const Rule& rule, int list, int rank) {
  auto* const near = reinterpret_cast<uint32_t*>(block_memory() + list);
  auto* const value = reinterpret_cast<float*>(block_memory() + list + list_bytes(rule.cols) / 2);
  float* const masked = blockIdx.x < kGroup ? rule.masked : nullptr;
  const Own own{rank, kGroup};
  const auto take = [&](int place, int e) {
    near[place] = static_cast<uint32_t>(e);
    value[place] = row.value(e);
  };
  const int count = masked ? compact<kThreads>(
                                 row, cut, own,
                                 [&](int place, int e) {
                                   take(place, e);
                                   masked[e] = row.value(e);
                                 },
                                 [&](int e) { masked[e] = 0; })
                           : compact<kThreads>(row, cut, own, take, [](int) {});
  if (blockIdx.x == 0) {
    if (rule.kept) {
      const int kept = count_kept<kThreads>(row, rule, cut);
      if (threadIdx.x == 0) *rule.kept = kept;
    }
    if (rule.guess && threadIdx.x == 0) __stcg(rule.guess, cut.key);
  }
  __syncthreads();
  return count;
}
template <int kThreads>
__device__ Cut keyed_cut(const KeyingRow<kThreads>& first, const KeyedRow<kThreads>& row, const Rule& rule,
                         int guess) {
  if (guess > 0 && searched(rule)) return find_cut_near<kThreads>(row, first, rule.bins, rule.keep, guess);
  first.template in_batches<4>(Own(), [](int, const int(&)[4], unsigned) {});
  __syncthreads();  // a cut that is not searched for has no barrier before keys of others are read
  return cut_of<kThreads>(row, rule);
}
template <int kThreads>
__device__ __noinline__ int choose_keyed(Rule rule, RowMemory memory, bool normed, float factor, int rank) {
  float *const values = floats_at(memory.row), *const scale = floats_at(memory.keys);
  const KeyedRow<kThreads> row{values, reinterpret_cast<const int*>(scale), rule.cols};
  const Cut cut =
      keyed_cut<kThreads>({values, scale, memory.scaled, rule.cols, normed, factor, floats_at(memory.gain)},
                          row, rule, select_scratch<kThreads>().guess);
  return choose<kThreads>(row, cut, rule, memory.list, rank);
}
/// x: where a row that is not held stands.
template <int kThreads>
__device__ __noinline__ int choose_all(Rule rule, RowMemory memory, const float* x, int rank) {
  const Cut all{0, kAllTies};
  if (memory.row < 0)
    return choose<kThreads>(MemoryRow<kThreads>{x, nullptr, rule.cols}, all, rule, memory.list, rank);
  return choose<kThreads>(MemoryRow<kThreads>{floats_at(memory.row), nullptr, rule.cols}, all, rule,
                          memory.list, rank);
}

/// A block's own channels of the row of `in`.
template <int kThreads>
__device__ Channels prepare_row(const Input& in, const RowMemory& memory, int rank) {
  Channels channels{false, memory.list, memory.list + list_bytes(in.cols) / 2, 0};
  if (memory.row < 0) {
    channels.count = choose_all<kThreads>(rule_of(in, memory.list), memory, in.x, rank);
    return channels;
  }
  // Once for a block, since the first one may leave the next guess meanwhile; with the row, since a thread
  // that waits for it by itself is late for everything behind.
  int& guess = select_scratch<kThreads>().guess;
  if (threadIdx.x == 0) {
    if (in.guess) {
      fetch_word(in.guess, &guess);
    } else {
      guess = 0;
    }
  }
  float* const values = floats_at(memory.row);
  const float factor = take_row<kThreads>(in, values);
  const bool normed = in.source == Source::norm;
  if (in.select == Selects::all) {
    if (normed) norm_row<kThreads>(in, floats_at(memory.gain), factor, values);
    leave_row<kThreads>(in, values);
    // Without a +0 the list is the row: then there is no need of one.
    const Own own{rank, kGroup};
    const int count = own.count(in.cols);
    bool full = true;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
      full &= __float_as_uint(values[own.entry(i)]) != 0;
    if (__syncthreads_and(full)) return {true, 0, memory.row + rank * 4, count};
    channels.count = choose_all<kThreads>(rule_of(in, memory.list), memory, nullptr, rank);
  } else {
    channels.count = choose_keyed<kThreads>(rule_of(in, memory.list), memory, normed, factor, rank);
    leave_row<kThreads>(in, values);
  }
  return channels;
}

/// What a row needs besides its input, before that is there.
template <int kThreads>
__device__ void begin_row(const Input& in, const RowMemory& memory) {
  if (memory.gain >= 0) fetch_row<kThreads>(in.gain, in.cols, floats_at(memory.gain));
  if (memory.scaled) fetch_row<kThreads>(in.scale, in.cols, floats_at(memory.keys));
  if (in.select == Selects::topk && memory.row >= 0) clear_bins<kThreads>(memory.list);
}

}  // namespace larosa::cuda
