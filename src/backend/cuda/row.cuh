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
__device__ inline float norm_entry(float x, float factor, const float* gain, int e) {
  const float y = __fmul_rn(x, factor);
  return gain ? __fmul_rn(y, gain[e]) : y;
}

/// Starts copying a row to shared memory. Copies that pass no register are all in flight at once; loads in a
/// rolled loop were waited for one by one (11008 entries: 7.9 µs, in unrolled ones 2.6).
template <int kThreads>
__device__ void fetch_row(const float* x, int cols, float* to) {
  const auto there = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0 && cols % 4 == 0) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * 4; i < cols; i += kThreads * 4)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there + i * 4), "l"(x + i) : "memory");
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < cols; i += kThreads)
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(there + i * 4), "l"(x + i) : "memory");
  }
}
__device__ inline void fetch_word(const void* x, void* to) {
  const auto there = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(there), "l"(x) : "memory");
}
/// Until the row is there for every thread.
__device__ inline void wait_for_row() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

/// A row or its norm in shared memory; gain: the norm's, or null. The blocks share in writing it down where
/// the input wants that.
template <int kThreads>
__device__ void make_row(const Input& in, const float* gain, float* values) {
  fetch_row<kThreads>(in.x, in.cols, values);
  wait_for_row();
  if (in.source != Source::norm) return;
  const float sum =
      square_sum<kThreads>([&](int e) { return values[e]; }, in.cols, select_scratch<kThreads>().reduced);
  const float factor = norm_factor(sum, in.cols, in.eps);
  const Run<kThreads> run(in.cols);
#pragma unroll 4
  for (int i = 0; i < run.steps; ++i) {
    const int e = run.entry(i);
    if (e < in.cols) values[e] = norm_entry(values[e], factor, gain, e);
  }
  __syncthreads();
  if (!in.values) return;
  const int me = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int end = (me + 1) * in.cols / blocks;
  for (int e = me * in.cols / blocks + static_cast<int>(threadIdx.x); e < end; e += kThreads)
    in.values[e] = values[e];
}

/// A block's dynamic shared memory. Code that reads it by offsets from here is compiled to shared loads; a
/// pointer that a function returned is not known to be shared.
__device__ inline char* block_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

/// Where a row's channels stand: all of them in the values, those that a list in shared memory names, or a
/// list in global memory.
enum class Where { all, near, list };
struct Channels {
  Where where;
  int values, near;  // offsets in the block's memory: float each, uint16_t each
  int count, kept;
};

/// Where a product's block has what: offsets in its memory. Gain and score weights are there before the row
/// is (of the first tile); keys take the place of the weights; a row's values are followed by its list.
struct RowMemory {
  int gain, keys;  // or -1
  int row;
  bool scaled;  // keys begin as score weights
};
__host__ __device__ inline int padded_bytes(int cols, int size) {
  return (cols * size + 15) / 16 * 16;
}
__host__ __device__ inline RowMemory row_memory(const Input& in, int at) {
  const bool made = in.source != Source::list;
  RowMemory m{-1, -1, at, made && in.scale};
  if (made && in.source == Source::norm && in.gain) {
    m.gain = m.row;
    m.row += padded_bytes(in.cols, 4);
  }
  if (made && (in.scale || in.select != Selects::all)) {
    m.keys = m.row;
    m.row += padded_bytes(in.cols, 4);
  }
  return m;
}
__host__ __device__ inline int row_bytes(const Input& in) {
  return in.source == Source::list ? 0 : padded_bytes(in.cols, 4) + padded_bytes(in.cols, 2);
}
__device__ inline float* floats_at(int offset) {
  return offset < 0 ? nullptr : reinterpret_cast<float*>(block_memory() + offset);
}

/// Lists what counts of the row at offset `at`.
template <int kThreads, class Row>
__device__ int2 choose(const Row& row, const Rule& rule, int at) {
  auto* const near = reinterpret_cast<uint16_t*>(block_memory() + at + padded_bytes(rule.cols, 4));
  const Cut cut = cut_of<kThreads>(row, rule, select_scratch<kThreads>().guess);
  const int2 counts =
      compact<kThreads>(row, cut, [&](int place, int i) { near[place] = static_cast<uint16_t>(i); });
  if (rule.guess && blockIdx.x == 0 && threadIdx.x == 0) __stcg(rule.guess, cut.key);
  __syncthreads();
  return counts;
}
template <int kThreads>
__device__ __noinline__ int2 choose_keyed(Rule rule, RowMemory memory) {
  const float* const values = floats_at(memory.row);
  const float* const scale = floats_at(memory.keys);
  int* const keys = reinterpret_cast<int*>(floats_at(memory.keys));  // each takes its weight's place
  const auto store = [&](int first, const int(&key)[4], unsigned there) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (there >> i & 1) keys[first + i * kWarp] = key[i];
  };
  if (memory.scaled) {
    in_fours<kThreads>(
        rule.cols, kNoKey, [&](int e) { return score_key(values[e], scale, e); }, store);
  } else {
    in_fours<kThreads>(
        rule.cols, kNoKey, [&](int e) { return score_key(values[e], nullptr, e); }, store);
  }
  return choose<kThreads>(KeyedRow<kThreads>{values, keys, rule.cols}, rule, memory.row);
}
template <int kThreads>
__device__ __noinline__ int2 choose_all(Rule rule, RowMemory memory) {
  return choose<kThreads>(MemoryRow<kThreads>{floats_at(memory.row), nullptr, rule.cols}, rule, memory.row);
}

/// The row of `in` in shared memory and the list of what counts of it. The blocks share in writing both down
/// where the input wants them.
template <int kThreads>
__device__ Channels prepare_row(const Input& in, const RowMemory& memory) {
  if (in.source == Source::list) {
    const int count = __ldcg(in.list.counts);
    return {Where::list, 0, 0, count, count};
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
  clear_bins<kThreads>();
  float* const values = floats_at(memory.row);
  make_row<kThreads>(in, floats_at(memory.gain), values);
  const Run<kThreads> run(in.cols);
  const int me = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (in.select == Selects::all && !in.list.index) {
    // Without a +0 the list is the row: then there is no need of one.
    bool full = true;
#pragma unroll 4
    for (int i = 0; i < run.steps; ++i) {
      const int e = run.entry(i);
      full &= e >= in.cols || __float_as_uint(values[e]) != 0;
    }
    if (__syncthreads_and(full)) return {Where::all, memory.row, 0, in.cols, in.cols};
  }
  const int2 counts = in.select == Selects::all ? choose_all<kThreads>(rule_of(in), memory)
                                                : choose_keyed<kThreads>(rule_of(in), memory);
  const Channels channels{Where::near, memory.row, memory.row + padded_bytes(in.cols, 4), counts.x, counts.y};
  if (in.list.index) {
    const auto* const near = reinterpret_cast<const uint16_t*>(block_memory() + channels.near);
    const int end = (me + 1) * channels.count / blocks;
    for (int i = me * channels.count / blocks + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const int e = near[i];
      in.list.index[i] = e;
      in.list.value[i] = values[e];
    }
    if (me == 0 && threadIdx.x == 0) {
      in.list.counts[0] = channels.count;
      in.list.counts[1] = channels.kept;
    }
  }
  return channels;
}

/// Starts to fetch what the row needs besides its input.
template <int kThreads>
__device__ void fetch_weights(const Input& in, const RowMemory& memory) {
  if (memory.gain >= 0) fetch_row<kThreads>(in.gain, in.cols, floats_at(memory.gain));
  if (memory.scaled) fetch_row<kThreads>(in.scale, in.cols, floats_at(memory.keys));
}

}  // namespace larosa::cuda
