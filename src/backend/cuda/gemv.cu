// The decoding product: one row times weights in channels layout. A tile is what a warp reads of one channel,
// 512 bytes; every warp of the grid takes an even share of one tile's channels, and the shares are added in a
// fixed order: in the block, then over the blocks of the tile by the last of them to arrive.
#include <algorithm>

#include "backend/cuda/gemv_types.cuh"
#include "backend/cuda/launch.h"
#include "backend/cuda/select.cuh"
#include "base/error.h"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kEarly = 16;  // channels per warp that are fetched before the row is ready: 17 MB in all

struct Part {
  const char* weight;
  const float* bias;
  float* y;
  int64_t line, padded;  // bytes of a channel; outputs that it has room for
  int out, first_tile;
  bool accumulate;
};

struct Args {
  Part part[kMostProducts];
  int parts, tiles;
  Input in;
  Scratch scratch;
};

/// Tile of a warp, and the first warp of a tile: `warps` shared evenly by `tiles`.
__device__ int tile_of(int warp_index, int tiles, int warps) {
  return static_cast<int>((static_cast<unsigned>(warp_index + 1) * static_cast<unsigned>(tiles) - 1) /
                          static_cast<unsigned>(warps));
}
__device__ int first_warp(int tile, int tiles, int warps) {
  return static_cast<int>(static_cast<unsigned>(tile) * static_cast<unsigned>(warps) /
                          static_cast<unsigned>(tiles));
}
__device__ const Part& part_of(const Args& a, int tile) {
  int p = 0;
#pragma unroll 1
  while (p + 1 < a.parts && tile >= a.part[p + 1].first_tile) ++p;
  return a.part[p];
}

/// Where a row's channels stand: all of them in `values` (shared memory), those that `near` lists of them, or
/// a list in global memory.
enum class Where { all, near, list };
struct Channels {
  Where where;
  const uint16_t* near;
  const int32_t* index;
  const float* values;
  int count;
};

/// Shared memory of a row: keys (the warps' sums take their place afterwards), values, list.
__host__ __device__ inline int64_t key_bytes(const Input& in) {
  return in.select == Selects::all ? 0 : (in.cols * 4 + 15) / 16 * 16;
}
__host__ __device__ inline int64_t sums_bytes(int tile) {
  return kWarps * tile * static_cast<int64_t>(sizeof(float));
}

/// body(e, v) for the thread's entries e < cols of a row, four loads ahead.
template <class Load, class Body>
__device__ void each_entry(int cols, const Load& load, const Body& body) {
  constexpr int kTogether = 4;
  const int steps = (cols + kThreads - 1) / kThreads, first = warp() * steps * kWarp + lane();
#pragma unroll 1
  for (int i = 0; i < steps; i += kTogether) {
    decltype(load(0)) loaded[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int e = first + (i + u) * kWarp;
      if (i + u < steps && e < cols) loaded[u] = load(e);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int e = first + (i + u) * kWarp;
      if (i + u < steps && e < cols) body(e, loaded[u]);
    }
  }
}

/// The row in shared memory, with the keys of its scores where something is selected. True when no entry is
/// +0: then a row that is read whole needs no list.
__device__ bool make_row(const Input& in, float* values, uint32_t* keys, float* reduced) {
  bool full = true;
  const auto put = [&](int e, float v, float scale) {
    values[e] = v;
    full &= __float_as_uint(v) != 0;
    if (in.select != Selects::all) keys[e] = score_key(v, &scale, 0);
  };
  const auto scale_of = [&](int e) { return in.scale ? __ldg(in.scale + e) : 1.0f; };
  if (in.source == Source::norm) {
    float sum = 0;
    each_entry(
        in.cols, [&](int e) { return __ldcg(in.x + e); },
        [&](int e, float v) {
          values[e] = v;
          sum = fmaf(v, v, sum);
        });
    const float factor = norm_factor(block_reduce<kThreads>(sum, reduced, Add()), in.cols, in.eps);
    each_entry(
        in.cols, [&](int e) { return make_float2(in.gain ? __ldg(in.gain + e) : 1.0f, scale_of(e)); },
        [&](int e, float2 by) { put(e, __fmul_rn(__fmul_rn(values[e], factor), by.x), by.y); });
  } else {
    const bool glu = in.source == Source::glu;
    each_entry(
        in.cols,
        [&](int e) { return make_float3(__ldcg(in.x + e), glu ? __ldcg(in.up + e) : 0, scale_of(e)); },
        [&](int e, float3 v) { put(e, glu ? gated(v.x, v.y, in.activation) : v.x, v.z); });
  }
  return __syncthreads_and(full);
}

__device__ Channels prepare(const Input& in, char* shared, int64_t sums, SelectScratch<kThreads>& scratch) {
  if (in.source == Source::list)
    return {Where::list, nullptr, in.list.index, in.list.value, __ldcg(in.list.counts)};
  uint32_t* keys = reinterpret_cast<uint32_t*>(shared);
  float* values = reinterpret_cast<float*>(shared + max(sums, key_bytes(in)));
  uint16_t* near = reinterpret_cast<uint16_t*>(values + in.cols);
  const bool full = make_row(in, values, keys, scratch.reduced);
  const bool store = blockIdx.x == 0, store_list = store && in.list.index;
  if (store && in.values) {
    for (int e = static_cast<int>(threadIdx.x); e < in.cols; e += kThreads) in.values[e] = values[e];
  }
  if (full && in.select == Selects::all && !in.list.index)
    return {Where::all, nullptr, nullptr, values, in.cols};
  // Without a selection the keys do not count; the values stand in for them.
  const KeyedRow<kThreads> row{values, in.select == Selects::all ? reinterpret_cast<uint32_t*>(values) : keys,
                               in.cols};
  const int2 counts = compact(row, cut_of(row, in, scratch), scratch, [&](int place, int i, float value) {
    near[place] = static_cast<uint16_t>(i);
    if (!store_list) return;
    in.list.index[place] = i;
    in.list.value[place] = value;
  });
  if (store_list && threadIdx.x == 0) {
    in.list.counts[0] = counts.x;
    in.list.counts[1] = counts.y;
  }
  __syncthreads();
  return {Where::near, near, nullptr, values, counts.x};
}

/// Brings what the row needs besides its input closer: the stream of weights has pushed it out of the caches.
__device__ void prefetch_row(const Input& in) {
  constexpr int kLine = 32;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * kLine; i < in.cols; i += kThreads * kLine) {
    if (in.gain) asm volatile("prefetch.global.L2 [%0];" ::"l"(in.gain + i));
    if (in.scale) asm volatile("prefetch.global.L2 [%0];" ::"l"(in.scale + i));
  }
}

/// bias, y before, and the sum, in this order.
__device__ void finish(const Part& part, int j, float sum) {
  if (j >= part.out) return;
  if (part.bias) sum = __fadd_rn(sum, part.bias[j]);
  if (part.accumulate) sum = __fadd_rn(sum, part.y[j]);
  part.y[j] = sum;
}

/// Adds the warps' sums of this block's tiles and, where a tile has several blocks, those of the blocks.
template <int kTile>
__device__ void join(const Args& a, const float* sums) {
  __shared__ bool last[2];
  const int block = static_cast<int>(blockIdx.x), warps = static_cast<int>(gridDim.x) * kWarps;
  const int begin = block * kWarps, end = begin + kWarps;
  const int first_tile = tile_of(begin, a.tiles, warps), last_tile = tile_of(end - 1, a.tiles, warps);
#pragma unroll 1
  for (int tile = first_tile; tile <= last_tile; ++tile) {
    const Part& part = part_of(a, tile);
    const int from = first_warp(tile, a.tiles, warps), to = first_warp(tile + 1, a.tiles, warps);
    const bool whole = from >= begin && to <= end;
    const int low = max(from, begin) - begin, high = min(to, end) - begin;
#pragma unroll 1
    for (int j = static_cast<int>(threadIdx.x); j < kTile; j += kThreads) {
      float sum = sums[low * kTile + j];
#pragma unroll 4
      for (int w = low + 1; w < high; ++w) sum = __fadd_rn(sum, sums[w * kTile + j]);
      if (whole) {
        finish(part, (tile - part.first_tile) * kTile + j, sum);
      } else {
        __stcg(a.scratch.partial + (static_cast<int64_t>(tile) + block) * kTile + j, sum);
      }
    }
  }
  // Only a block's first and last tile can reach into other blocks.
  __threadfence();
  __syncthreads();
  if (threadIdx.x < 2) {
    const int tile = threadIdx.x == 0 ? first_tile : last_tile;
    const int from = first_warp(tile, a.tiles, warps), to = first_warp(tile + 1, a.tiles, warps);
    const bool shared = (from < begin || to > end) && (threadIdx.x == 0 || last_tile != first_tile);
    const int others = (to - 1) / kWarps - from / kWarps;
    last[threadIdx.x] = shared && atomicAdd(a.scratch.ticket + tile, 1u) == static_cast<uint32_t>(others);
    if (last[threadIdx.x]) a.scratch.ticket[tile] = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    if (!last[t]) continue;
    __threadfence();
    const int tile = t == 0 ? first_tile : last_tile;
    const Part& part = part_of(a, tile);
    const int from = first_warp(tile, a.tiles, warps) / kWarps;
    const int to = (first_warp(tile + 1, a.tiles, warps) - 1) / kWarps;
#pragma unroll 1
    for (int j = static_cast<int>(threadIdx.x); j < kTile; j += kThreads) {
      const float* partial = a.scratch.partial + static_cast<int64_t>(tile) * kTile + j;
      float sum = __ldcg(partial + static_cast<int64_t>(from) * kTile);
#pragma unroll 8
      for (int b = from + 1; b <= to; ++b)
        sum = __fadd_rn(sum, __ldcg(partial + static_cast<int64_t>(b) * kTile));
      finish(part, (tile - part.first_tile) * kTile + j, sum);
    }
  }
}

/// Up to kAhead of the channels e, e + step, … of the list; kWhole: all of them are there.
template <class Type, Where kWhere, bool kWhole>
__device__ void add_batch(const Channels& channels, int e, int step, const char* weight, int64_t line,
                          int64_t first, int l, int64_t padded, float (&sum)[Type::kLane]) {
  constexpr int kAhead = Type::kAhead;
  typename Type::Loaded loaded[kAhead];
  float x[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    const int at = kWhole ? e + u * step : min(e + u * step, channels.count - 1);
    const int c = kWhere == Where::all    ? at
                  : kWhere == Where::near ? channels.near[at]
                                          : __ldcg(channels.index + at);
    x[u] = kWhere == Where::list ? __ldcg(channels.values + at) : channels.values[c];
    loaded[u] = Type::load(weight + c * line, first, l, padded);
  }
  __syncwarp();  // keeps the loads together: without it each is waited for before the next is issued
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (kWhole || e + u * step < channels.count) Type::add(loaded[u], x[u], sum);
  }
}

/// Adds the warp's share of the channels. Lanes beyond the last output read what the first lane reads.
template <class Type, Where kWhere>
__device__ void accumulate(const Channels& channels, int e, int step, const Part& part, int64_t first,
                           float (&sum)[Type::kLane]) {
  const char* const weight = part.weight;
  const int64_t line = part.line, padded = part.padded;
  const int l = first + Type::output(lane(), 0) < padded ? lane() : 0;
#pragma unroll 1
  for (; e + (Type::kAhead - 1) * step < channels.count; e += Type::kAhead * step)
    add_batch<Type, kWhere, true>(channels, e, step, weight, line, first, l, padded, sum);
  if (e < channels.count)
    add_batch<Type, kWhere, false>(channels, e, step, weight, line, first, l, padded, sum);
}

template <class Type>
__global__ void __launch_bounds__(kThreads) gemv_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) char shared[];
  __shared__ SelectScratch<kThreads> scratch;
  constexpr int kTile = kWarp * Type::kLane;
  float* sums = reinterpret_cast<float*>(shared);
  let_next_start();
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  const int me = static_cast<int>(blockIdx.x) * kWarps + warp();
  const int tile = tile_of(me, a.tiles, warps);
  const int from = first_warp(tile, a.tiles, warps), step = first_warp(tile + 1, a.tiles, warps) - from;
  const Part& part = part_of(a, tile);
  const int64_t first = static_cast<int64_t>(tile - part.first_tile) * kTile;
  prefetch_row(a.in);
  if (a.in.select == Selects::all && a.in.source != Source::list && lane() % 4 == 0 &&
      first + Type::output(lane(), 0) < part.padded) {
    // Weights do not depend on what runs before: the first channels are on their way when the row is ready.
#pragma unroll 1
    for (int u = 0, e = me - from; u < kEarly && e < a.in.cols; ++u, e += step)
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(part.weight + e * part.line + Type::offset(first, lane())));
  }
  wait_for_inputs();
  const Channels channels = prepare(a.in, shared, sums_bytes(kTile), scratch);
  float sum[Type::kLane] = {};
  if (channels.where == Where::all) {
    accumulate<Type, Where::all>(channels, me - from, step, part, first, sum);
  } else if (channels.where == Where::near) {
    accumulate<Type, Where::near>(channels, me - from, step, part, first, sum);
  } else {
    accumulate<Type, Where::list>(channels, me - from, step, part, first, sum);
  }
#pragma unroll
  for (int i = 0; i < Type::kLane; ++i) sums[warp() * kTile + Type::output(lane(), i)] = sum[i];
  __syncthreads();
  join<kTile>(a, sums);
}

/// Weights whose lines are not multiples of 16 bytes: element by element.
template <class T>
struct Unaligned {
  static constexpr int kLane = 16 / sizeof(T), kAhead = 2;
  struct Loaded {
    T element[kLane];
  };
  __device__ static int64_t offset(int64_t, int) { return 0; }
  __device__ static Loaded load(const char* line, int64_t first, int l, int64_t padded) {
    Loaded v = {};
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (first + output(l, i) < padded)
        v.element[i] = reinterpret_cast<const T*>(line)[first + output(l, i)];
    }
    return v;
  }
  __device__ static void add(const Loaded& v, float x, float (&sum)[kLane]) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum[i] = fmaf(x, widen(v.element[i]), sum[i]);
  }
  __device__ static int output(int l, int i) {
    return l * kLane + i;
  }
};

struct Format {
  int tile;        // outputs that a warp reads of a channel
  int64_t padded;  // outputs that a line has room for
  bool aligned;
};
Format format_of(const Weight& w) {
  const bool base = reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
  if (w.dtype == DType::int8) return {kWarp * Bytes::kLane, padded_line(w.out), base};
  if (w.dtype == DType::int4) return {kWarp * Nibbles::kLane, padded_line(w.out), base};
  const int64_t size = dtype_size(w.dtype);
  return {static_cast<int>(kWarp * 16 / size), w.out, base && w.out * size % 16 == 0};
}

int64_t shared_bytes(const Input& in, int tile) {
  if (in.source == Source::list) return sums_bytes(tile);
  return std::max(sums_bytes(tile), key_bytes(in)) + in.cols * 6;
}

template <class Type>
void launch(const Stream& s, const Args& a) {
  const int blocks = std::max(s.multiprocessors, (a.tiles + kWarps - 1) / kWarps);
  launch_kernel(s, gemv_kernel<Type>, blocks, kThreads, shared_bytes(a.in, kWarp * Type::kLane), a);
}

}  // namespace

bool gemv_together(const Weight& a, const Weight& b) {
  return a.layout == Layout::channels && b.layout == Layout::channels && a.dtype == b.dtype &&
         format_of(a).aligned == format_of(b).aligned;
}

bool gemv_fuses(const Stream& s, const Input& in, const Weight& w) {
  constexpr int64_t kLongest = 65536;  // a listed channel is 16 bits
  const Format f = format_of(w);
  return f.aligned && in.cols <= kLongest && shared_bytes(in, f.tile) <= s.shared_bytes;
}

void gemv(const Stream& s, const Input& in, std::span<const Product> products, const Scratch& scratch) {
  CHECK(!products.empty() && products.size() <= kMostProducts);
  Args a{};
  a.in = in;
  a.scratch = scratch;
  for (const Product& p : products) {
    const Format f = format_of(p.weight);
    a.part[a.parts++] = {
        static_cast<const char*>(p.weight.data), p.weight.bias, p.y.data,    p.weight.line_bytes(), f.padded,
        static_cast<int>(p.weight.out),          a.tiles,       p.accumulate};
    a.tiles += static_cast<int>((f.padded + f.tile - 1) / f.tile);
  }
  CHECK(a.tiles + std::max(s.multiprocessors, a.tiles / kWarps + 1) <= kTickets);
  const Weight& w = products[0].weight;
  if (!format_of(w).aligned) {
    CHECK(!quantised(w.dtype));  // their memory is always aligned
    if (w.dtype == DType::f32) return launch<Unaligned<float>>(s, a);
    if (w.dtype == DType::f16) return launch<Unaligned<__half>>(s, a);
    return launch<Unaligned<__nv_bfloat16>>(s, a);
  }
  switch (w.dtype) {
    case DType::f32:
      return launch<Plain<float>>(s, a);
    case DType::f16:
      return launch<Plain<__half>>(s, a);
    case DType::bf16:
      return launch<Plain<__nv_bfloat16>>(s, a);
    case DType::int8:
      return launch<Bytes>(s, a);
    case DType::int4:
      return launch<Nibbles>(s, a);
    default:
      CHECK(false);
  }
}

}  // namespace larosa::cuda
