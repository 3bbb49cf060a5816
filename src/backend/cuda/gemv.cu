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
constexpr int kAhead = 8;  // channels in flight per warp: 64 KB per multiprocessor hide 0.8 µs at 4.3 TB/s

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
  return static_cast<int>((static_cast<int64_t>(warp_index + 1) * tiles - 1) / warps);
}
__device__ int first_warp(int tile, int tiles, int warps) {
  return static_cast<int>(static_cast<int64_t>(tile) * warps / tiles);
}
__device__ const Part& part_of(const Args& a, int tile) {
  int p = 0;
  while (p + 1 < a.parts && tile >= a.part[p + 1].first_tile) ++p;
  return a.part[p];
}

/// The list that the channels are taken from.
struct Channels {
  const uint16_t* near;  // in shared memory, into `values`; or null
  const int32_t* index;
  const float* values;
  int count;

  __device__ int channel(int e) const { return near ? near[e] : __ldcg(index + e); }
  __device__ float value(int e, int c) const { return near ? values[c] : __ldcg(values + e); }
};

template <int kItems>
__device__ Channels prepare(const Input& in, char* shared, SelectScratch<kThreads>& scratch) {
  if constexpr (kItems == 0) {
    return {nullptr, in.list.index, in.list.value, __ldcg(in.list.counts)};
  } else {
    float* values = reinterpret_cast<float*>(shared);
    uint16_t* near = reinterpret_cast<uint16_t*>(values + in.cols);
    const RegisterRow<kThreads, kItems> row(in, scratch);
    const bool store_list = in.list.index && blockIdx.x == 0;
    const int2 counts = compact(row, cut_of(row, in, scratch), scratch, [&](int place, int i, float value) {
      near[place] = static_cast<uint16_t>(i);
      values[i] = value;
      if (!store_list) return;
      in.list.index[place] = i;
      in.list.value[place] = value;
    });
    if (store_list && threadIdx.x == 0) {
      in.list.counts[0] = counts.x;
      in.list.counts[1] = counts.y;
    }
    if (in.values && blockIdx.x == 0) {
      row.each([&](int i, bool valid, float value, uint32_t) {
        if (valid) in.values[i] = value;
      });
    }
    __syncthreads();
    return {near, nullptr, values, counts.x};
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
  for (int tile = first_tile; tile <= last_tile; ++tile) {
    const Part& part = part_of(a, tile);
    const int from = first_warp(tile, a.tiles, warps), to = first_warp(tile + 1, a.tiles, warps);
    const bool whole = from >= begin && to <= end;
    const int low = max(from, begin) - begin, high = min(to, end) - begin;
    for (int j = static_cast<int>(threadIdx.x); j < kTile; j += kThreads) {
      float sum = sums[low * kTile + j];
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
  for (int t = 0; t < 2; ++t) {
    if (!last[t]) continue;
    __threadfence();
    const int tile = t == 0 ? first_tile : last_tile;
    const Part& part = part_of(a, tile);
    const int from = first_warp(tile, a.tiles, warps) / kWarps;
    const int to = (first_warp(tile + 1, a.tiles, warps) - 1) / kWarps;
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

template <class Type, int kItems>
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
  const bool reads = first + Type::output(lane(), 0) < part.padded;
  if (kItems > 0 && a.in.select == Selects::all && reads) {
    // Weights do not depend on what runs before: the first channels are on their way when the row is ready.
    for (int u = 0, e = me - from; u < 2 * kAhead && e < a.in.cols; ++u, e += step) {
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(part.weight + e * part.line + Type::offset(first, lane())));
    }
  }
  wait_for_inputs();
  const Channels channels = prepare<kItems>(a.in, shared + kWarps * kTile * sizeof(float), scratch);

  float sum[Type::kLane] = {};
  for (int e = me - from; e < channels.count; e += kAhead * step) {
    typename Type::Loaded loaded[kAhead];
    float x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = e + u * step;
      x[u] = 0;
      loaded[u] = {};
      if (at >= channels.count) continue;
      const int c = channels.channel(at);
      x[u] = channels.value(at, c);
      if (reads) loaded[u] = Type::load(part.weight + c * part.line, first, lane(), part.padded);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) Type::add(loaded[u], x[u], sum);
  }
#pragma unroll
  for (int i = 0; i < Type::kLane; ++i) sums[warp() * kTile + Type::output(lane(), i)] = sum[i];
  __syncthreads();
  join<kTile>(a, sums);
}

/// Weights whose lines are not multiples of 16 bytes: element by element.
template <class T>
struct Unaligned {
  static constexpr int kLane = 16 / sizeof(T);
  struct Loaded {
    T element[kLane];
  };
  __device__ static int64_t offset(int64_t, int) { return 0; }
  __device__ static Loaded load(const char* line, int64_t first, int l, int64_t padded) {
    Loaded v = {};
    for (int i = 0; i < kLane && first + output(l, i) < padded; ++i)
      v.element[i] = reinterpret_cast<const T*>(line)[first + output(l, i)];
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

int64_t fused_bytes(const Input& in) {
  return (in.cols * 6 + 15) / 16 * 16;
}

template <class Type, int kItems>
void launch(const Stream& s, const Args& a, int64_t shared) {
  shared += kWarps * kWarp * Type::kLane * static_cast<int64_t>(sizeof(float));
  const int blocks = std::max(s.multiprocessors, (a.tiles + kWarps - 1) / kWarps);
  launch_kernel(s, gemv_kernel<Type, kItems>, blocks, kThreads, shared, a);
}

template <class Type>
void launch_items(const Stream& s, const Args& a) {
  if (a.in.source == Source::list) return launch<Type, 0>(s, a, 0);
  const int64_t items = (a.in.cols + kThreads - 1) / kThreads, shared = fused_bytes(a.in);
  if (items <= 8) return launch<Type, 8>(s, a, shared);
  if (items <= 24) return launch<Type, 24>(s, a, shared);
  launch<Type, 40>(s, a, shared);
}

}  // namespace

bool gemv_together(const Weight& a, const Weight& b) {
  return a.layout == Layout::channels && b.layout == Layout::channels && a.dtype == b.dtype &&
         format_of(a).aligned == format_of(b).aligned;
}

bool gemv_fuses(const Stream& s, const Input& in, const Weight& w) {
  constexpr int64_t kLongest = 40 * kThreads;
  const int64_t sums = kWarps * format_of(w).tile * static_cast<int64_t>(sizeof(float));
  return format_of(w).aligned && in.cols <= kLongest && sums + fused_bytes(in) <= s.shared_bytes;
}

void gemv(const Stream& s, const Input& in, std::span<const Product> products, const Scratch& scratch) {
  CHECK(!products.empty() && products.size() <= kMostProducts);
  Args a{};
  a.in = in;
  a.scratch = scratch;
  for (const Product& p : products) {
    const Format f = format_of(p.weight);
    a.part[a.parts++] = {static_cast<const char*>(p.weight.data),
                         p.weight.bias,
                         p.y.data,
                         p.weight.line_bytes(),
                         f.padded,
                         static_cast<int>(p.weight.out),
                         a.tiles,
                         p.accumulate};
    a.tiles += static_cast<int>((f.padded + f.tile - 1) / f.tile);
  }
  CHECK(a.tiles + std::max(s.multiprocessors, a.tiles / kWarps + 1) <= kTickets);
  const Weight& w = products[0].weight;
  if (!format_of(w).aligned) {
    CHECK(!quantised(w.dtype));  // their memory is always aligned
    if (w.dtype == DType::f32) return launch<Unaligned<float>, 0>(s, a, 0);
    if (w.dtype == DType::f16) return launch<Unaligned<__half>, 0>(s, a, 0);
    return launch<Unaligned<__nv_bfloat16>, 0>(s, a, 0);
  }
  switch (w.dtype) {
    case DType::f32:
      return launch_items<Plain<float>>(s, a);
    case DType::f16:
      return launch_items<Plain<__half>>(s, a);
    case DType::bf16:
      return launch_items<Plain<__nv_bfloat16>>(s, a);
    case DType::int8:
      return launch_items<Bytes>(s, a);
    case DType::int4:
      return launch_items<Nibbles>(s, a);
    default:
      CHECK(false);
  }
}

}  // namespace larosa::cuda
