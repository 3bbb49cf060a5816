// The row that a product reads: every block makes it for itself, normalised and selected from where its input
// says so, and lists its own channels in shared memory.
#pragma once

#include "backend/cuda/select.cuh"

namespace larosa::cuda {

/// A row that a row's entries are multiplied with, in shared memory: room for every vector that threads have.
__host__ __device__ inline int factors_bytes(int cols) {
  return vectors_for(cols) * 16 * kRowThreads;
}
/// Starts copying it, for threads of so many vectors. A thread copies what it multiplies with, and beyond the
/// row puts zeros.
__device__ inline void fetch_factors(const float* from, int cols, int vectors, float* to) {
  const int first = first_vector(vectors);
  const bool whole = reinterpret_cast<uintptr_t>(from) % 16 == 0 && cols % 4 == 0;
#pragma unroll 1
  for (int e = first * 4; e < (first + vectors * kWarp) * 4; e += 4 * kWarp) {
    if (whole && e < cols) {
      fetch_vector(from + e, to + e);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (e + i < cols) {
          fetch_word(from + e + i, to + e + i);
        } else {
          to[e + i] = 0;
        }
      }
    }
  }
}
/// Vector `vector` of it, which is the thread's, once its copies are there.
__device__ inline float4 factors_at(int factors, int vector) {
  return reinterpret_cast<const float4*>(block_memory() + factors)[vector];
}
/// x times these.
__device__ inline void multiply_by(int factors, int vector, float (&x)[4]) {
  const float4 by = factors_at(factors, vector);
  x[0] = __fmul_rn(x[0], by.x), x[1] = __fmul_rn(x[1], by.y);
  x[2] = __fmul_rn(x[2], by.z), x[3] = __fmul_rn(x[3], by.w);
}

__device__ inline float* floats_at(int offset) {
  return reinterpret_cast<float*>(block_memory() + offset);
}
/// Bytes of the longest list of a block's own channels: numbers and values.
__host__ __device__ inline int list_bytes(int cols) {
  return 2 * (((cols + kGroup - 1) / kGroup * 4 + 15) / 16 * 16);
}
/// A block's own channels in its memory, in order: their numbers, where these are listed, and values.
struct List {
  int near_at, value_at;  // offsets

  __device__ uint32_t* near() const { return reinterpret_cast<uint32_t*>(block_memory() + near_at); }
  __device__ float* value() const { return floats_at(value_at); }
  __device__ void put(int place, int e, float x) const {
    near()[place] = static_cast<uint32_t>(e);
    value()[place] = x;
  }
};
/// All of them, or those of the list.
struct Channels {
  bool all;
  List list;
  int count;
};

/// Where a product's block has what: offsets in its memory. Gain and score weights are there before the row
/// is; the list comes where bins were.
struct RowMemory {
  int gain, scale;  // or -1
  int list, end;
};
/// held: the row fits into registers; one that does not stands ready, and only its list is made.
__host__ __device__ inline RowMemory row_memory(const Input& in, bool held) {
  RowMemory m{-1, -1, 0, 0};
  if (held && in.source == Source::norm && in.gain) m.gain = m.list, m.list += factors_bytes(in.cols);
  if (held && in.select != Selects::all && in.scale) m.scale = m.list, m.list += factors_bytes(in.cols);
  m.end = m.list + list_bytes(in.cols);
  if (held && in.select == Selects::topk && m.end < m.list + kBinBytes) m.end = m.list + kBinBytes;
  return m;
}
__device__ inline List list_of(const RowMemory& memory, int cols) {
  return {memory.list, memory.list + list_bytes(cols) / 2};
}

/// What a row needs besides its input, before that is there, and before a barrier.
__device__ inline void begin_row(const Input& in, const RowMemory& memory) {
  if (memory.gain >= 0) fetch_factors(in.gain, in.cols, vectors_for(in.cols), floats_at(memory.gain));
  if (memory.scale >= 0) fetch_factors(in.scale, in.cols, vectors_for(in.cols), floats_at(memory.scale));
  if (in.select != Selects::topk) return;
  clear_bins(memory.list);
  // Once for a block: its first one may leave the next guess meanwhile. Not by the thread that waits for the
  // inputs, which would begin to look for them half a microsecond later.
  if (threadIdx.x == kRowThreads - 1) select_scratch().guess = in.guess ? __ldcg(in.guess) : 0;
}

/// The entries rank, rank + 4, … whose value x[v] is `kept(v)` and not zero, to the list in their order;
/// returns how many.
template <int kVectors, class Kept>
__device__ int list_kept(const Places<kVectors>& at, const float (&x)[kVectors], int cols, int rank,
                         const Kept& kept, const List& list) {
  auto& s = select_scratch();
  const uint32_t below = (1u << lane()) - 1;
  uint32_t mask[kVectors];
  int count = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    mask[v] = __ballot_sync(~0u, kept(v) & (at.entry(v, rank) < cols) & (__float_as_uint(x[v]) != 0));
    count += __popc(mask[v]);
  }
  if (lane() == 0) s.of_warp[warp()] = count;
  __syncthreads();
  const int listed = lane() < kRowWarps ? s.of_warp[lane()] : 0;
  int place = __reduce_add_sync(~0u, lane() < warp() ? listed : 0);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (mask[v] >> lane() & 1) list.put(place + __popc(mask[v] & below), at.entry(v, rank), x[v]);
    place += __popc(mask[v]);
  }
  return __reduce_add_sync(~0u, listed);
}

/// A block's own channels of a row of which all counts.
template <int kVectors>
__device__ Channels list_whole(const Places<kVectors>& at, const float (&x)[kVectors], int cols, int rank,
                               const List& list) {
  // Without a +0 the list is the row: then there is no need of one.
  bool full = true;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at.entry(v, rank) >= cols) continue;
    full &= __float_as_uint(x[v]) != 0;
    list.value()[at.vector(v)] = x[v];
  }
  if (__syncthreads_and(full)) return {true, list, Own{rank, kGroup}.count(cols)};
  const int count = list_kept(
      at, x, cols, rank, [](int) { return true; }, list);
  __syncthreads();
  return {false, list, count};
}

/// The run of a row that a block writes down where the input wants that, an entry a thread: a norm, and a
/// selection as a row with zeros. Few threads have one, so these entries are read once more, beside the row.
class Leaving {
 public:
  __device__ explicit Leaving(const Input& in)
      : first_(static_cast<int>(blockIdx.x) * in.left + static_cast<int>(threadIdx.x)),
        end_(min(static_cast<int>(blockIdx.x + 1) * in.left, in.cols)) {
    if (first_ < end_) x_ = __ldcg(in.x + first_);
  }
  __device__ void leave(const Input& in, const RowMemory& memory, float factor, const Cut& cut) const {
    const float* const gain = memory.gain < 0 ? nullptr : floats_at(memory.gain);
    const float* const scale = memory.scale < 0 ? nullptr : floats_at(memory.scale);
#pragma unroll 1
    for (int e = first_; e < end_; e += kRowThreads) {
      float x = e == first_ ? x_ : __ldcg(in.x + e);
      if (in.source == Source::norm) {
        x = norm_entry(x, factor, gain, e);
        if (in.values) in.values[e] = x;
      }
      if (in.masked) in.masked[e] = cut.keeps(e, score_key(scale ? __fmul_rn(x, scale[e]) : x)) ? x : 0;
    }
  }

 private:
  int first_, end_;
  float x_ = 0;
};

/// A block's own channels of a row in registers. The first block leaves what the next launch starts from.
template <int kVectors>
__device__ Channels held_row(const Input& in, const RowMemory& memory, int rank) {
  Vectors<kVectors> row{own_places<kVectors>(), {}};
  row.load(in.x, in.cols);
  const Leaving leaving(in);
  row.clear_beyond(in.cols);
  wait_for_fetched();
  float factor = 1;
  if (in.source == Source::norm) {
    factor = norm_factor(row.square_sum(select_scratch().reduced), in.cols, in.eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[v][i] = __fmul_rn(row.x[v][i], factor);
      if (memory.gain >= 0) multiply_by(memory.gain, row.at.vector(v), row.x[v]);
    }
  }
  float own[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) own[v] = pick_of(row.x[v], rank);
  const List list = list_of(memory, in.cols);
  if (in.select == Selects::all) {
    const Channels channels = list_whole(row.at, own, in.cols, rank, list);
    leaving.leave(in, memory, factor, keep_all());
    return channels;
  }
  HeldKeys<kVectors> keys{row.at, {}};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float4 by{1, 1, 1, 1};
    if (memory.scale >= 0) by = factors_at(memory.scale, row.at.vector(v));
    keys.key[v][0] = magnitude(row.x[v][0], by.x), keys.key[v][1] = magnitude(row.x[v][1], by.y);
    keys.key[v][2] = magnitude(row.x[v][2], by.z), keys.key[v][3] = magnitude(row.x[v][3], by.w);
  }
  const Cut cut = cut_of(keys, in, memory.list, select_scratch().guess);
  const auto kept = [&](int v) { return cut.keeps(row.at.entry(v, rank), pick_of(keys.key[v], rank)); };
  const int count = list_kept(row.at, own, in.cols, rank, kept, list);
  if (blockIdx.x == 0) {
    if (in.kept) {
      const int all = count_kept(keys, in, cut);
      if (threadIdx.x == 0) *in.kept = all;
    }
    if (in.guess && threadIdx.x == 0) __stcg(in.guess, cut.key);
  }
  __syncthreads();
  leaving.leave(in, memory, factor, cut);
  return {false, list, count};
}

/// A block's own channels of the row of `in`.
__device__ inline Channels prepare_row(const Input& in, const RowMemory& memory, bool held, int rank) {
  Channels channels{false, list_of(memory, in.cols), 0};
  if (held) {
    with_vectors(in.cols, [&](auto n) { channels = held_row<n.value>(in, memory, rank); });
  } else {
    const List list = channels.list;
    channels.count = list_stored(in.x, in.cols, Own{rank, kGroup},
                                 [&](int place, int e, float x) { list.put(place, e, x); });
    __syncthreads();
  }
  return channels;
}

}  // namespace larosa::cuda
