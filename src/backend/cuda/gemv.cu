// The decoding product: one row times weights in channels layout. A group of blocks has a range of the
// outputs, its tile. Each block has its own channels of it, which its threads share, 16 bytes of outputs
// each, and their sums are added in a fixed order: in the block, then over the blocks of the group, which
// send them to each other.
#include <algorithm>

#include "backend/cuda/gemv_types.cuh"
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"
#include "base/error.h"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 512;

// A dependent launch puts its blocks where there is room, two on one multiprocessor and none on another if it
// comes to that: on 66 of an H200's 132 then, and half of the bandwidth is lost. So a block takes more than
// half of a multiprocessor's shared memory.
constexpr int64_t kLeastShared = 116 << 10;

/// How a weight's channels are read: a struct of gemv_types.cuh each.
enum class Format { f32, f16, bf16, int8, int4, loose_f32, loose_f16, loose_bf16 };

struct Lines {
  const char* data;
  int64_t line;  // bytes of a channel
  int padded;    // outputs that it has room for
  Format format;
};

struct Part {
  Lines lines;
  const float* bias;
  float* y;
  int out, first;  // first: granule where it begins
  bool accumulate;
};

struct SkipArgs {
  const float* x;
  Lines lines;
  int cols;
};

struct Args {
  Part part[kMostProducts];
  int parts;
  Format format;                 // of every part
  int granule, granules, tiles;  // outputs of a granule; granules in all; tiles they are shared out to
  bool paired;                   // a tile has the same outputs of both parts
  bool held;                     // a block's memory holds the row
  int skips;
  SkipArgs skip[kMostSkips];
  Glu glu;
  Input in;
  uint64_t* sent;
  uint32_t stamp;  // of the first round of tiles
  Link link;
};

/// The outputs of a tile stand side by side: of a run of the parts, or the same outputs of two parts.
struct Tile {
  int first;    // granule
  int half;     // outputs of a run, or of each of the two
  int columns;  // in all
};
__device__ Tile tile_at(const Args& a, int tile) {
  const int first = tile * a.granules / a.tiles, end = (tile + 1) * a.granules / a.tiles;
  const int half = (end - first) * a.granule;
  return {first, half, a.paired ? 2 * half : half};
}
struct Place {
  int part, output;
};
__device__ Place place_of(const Args& a, const Tile& tile, int column) {
  if (a.paired) {
    const int part = column >= tile.half;
    return {part, tile.first * a.granule + column - part * tile.half};
  }
  const int output = tile.first * a.granule + column;
  int p = 0;
#pragma unroll 1
  while (p + 1 < a.parts && output >= a.part[p + 1].first * a.granule) ++p;
  return {p, output - a.part[p].first * a.granule};
}

/// What a thread reads: the vector of outputs from `column` of the tile on, of every `step`-th of the block's
/// own channels. Threads that are left over do what those before them do.
struct Share {
  int column;
  int first, step;
  bool counts;  // not left over
};
__device__ Share share_of(const Tile& tile, int lane) {
  const int vectors = tile.columns / lane, thread = static_cast<int>(threadIdx.x);
  const int groups = kThreads / vectors, group = thread / vectors;
  return {thread % vectors * lane, min(group, groups - 1), groups, group < groups};
}

/// A thread's vector of channel 0, and the bytes from one channel to the next.
struct Vector {
  const char* data;
  uint32_t line;
  int extra;  // gemv_types.cuh
};

/// Up to kAhead of the channels e, e + step, … ; kWhole: all of them are there.
template <class Type, bool kAll, bool kWhole>
__device__ void add_batch(const Channels& channels, int e, int step, const Vector& vector,
                          float (&sum)[Type::kLane]) {
  constexpr int kAhead = Type::kAhead, kStride = kAll ? kGroup : 1;
  const auto* const near = reinterpret_cast<const uint32_t*>(block_memory() + channels.near);
  const auto* const value = reinterpret_cast<const float*>(block_memory() + channels.value);
  const auto place = [&](int u) { return kWhole ? e + u * step : min(e + u * step, channels.count - 1); };
  typename Type::Loaded loaded[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    const uint32_t channel = kAll ? place(u) : near[place(u)];
    loaded[u] = Type::load(vector.data + uint64_t{channel} * vector.line, vector.extra);
  }
  __syncwarp();  // keeps the loads together: without it each is waited for before the next is issued
  asm volatile("" : "+r"(e));  // and their places are worked out again: kept, they were spilled
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (!kWhole && e + u * step >= channels.count) continue;
    Type::add(loaded[u], value[place(u) * kStride], sum);
  }
}
template <class Type, bool kAll>
__device__ void add_channels(const Channels& channels, const Share& share, const Vector& vector,
                             float (&sum)[Type::kLane]) {
  const int step = share.step;
  int e = share.first;
  // Lanes of a warp can belong to two groups; they turn the loop together.
  const int before = e - __reduce_min_sync(~0u, e), behind = __reduce_max_sync(~0u, e) - e;
#pragma unroll 1
  for (; e + behind + (Type::kAhead - 1) * step < channels.count; e += Type::kAhead * step)
    add_batch<Type, kAll, true>(channels, e, step, vector, sum);
#pragma unroll 1
  for (; e - before < channels.count; e += Type::kAhead * step)
    add_batch<Type, kAll, false>(channels, e, step, vector, sum);
}

/// Floats from one thread's sums to the next one's: eight threads that write four floats each are in
/// different banks then.
__host__ __device__ constexpr int sums_pitch(int lane) {
  return lane / 4 % 2 == 0 ? lane + 4 : lane;
}
/// The thread's sums to shared memory at offset `at`, where the row was. A function of its own: inlined, the
/// caller's values were spilled and fetched again inside of its loops (2 % of the tokens/s at 50 %), and
/// every kernel had its own copy for every format.
template <class Type>
__device__ __noinline__ void add_vectors(Channels channels, int rank, Share share, Vector vector, int padded,
                                         int output, int at) {
  // Vectors beyond the last output read the first one.
  const int v = output < padded ? output / Type::kLane : 0;
  vector.data += v * 16;
  vector.extra = Type::extra(v, padded);
  float sum[Type::kLane] = {};
  if (channels.all) {  // of every group of channels the one that is the block's
    vector.data += rank * vector.line;
    vector.line *= kGroup;
    add_channels<Type, true>(channels, share, vector, sum);
  } else {
    add_channels<Type, false>(channels, share, vector, sum);
  }
  __syncthreads();  // the row has been read
  constexpr int kPitch = sums_pitch(Type::kLane);
  auto* const sums = reinterpret_cast<float4*>(block_memory() + at) + threadIdx.x * (kPitch / 4);
#pragma unroll
  for (int i = 0; i < Type::kLane; i += 4)
    sums[i / 4] = share.counts ? float4{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]} : float4{};
  __syncthreads();
}
__device__ void add_format(Format format, const Channels& channels, int rank, const Share& share,
                           const Lines& lines, int output, int at) {
  const Vector vector{lines.data, static_cast<uint32_t>(lines.line), 0};
  const auto add = [&](auto type) {
    add_vectors<decltype(type)>(channels, rank, share, vector, lines.padded, output, at);
  };
  switch (format) {
    case Format::f32:
      return add(Plain<float>());
    case Format::f16:
      return add(Plain<__half>());
    case Format::bf16:
      return add(Plain<__nv_bfloat16>());
    case Format::int8:
      return add(Bytes());
    case Format::int4:
      return add(Nibbles());
    case Format::loose_f32:
      return add(Unaligned<float>());
    case Format::loose_f16:
      return add(Unaligned<__half>());
    default:
      return add(Unaligned<__nv_bfloat16>());
  }
}

/// Outputs of a vector, and of the fewest whole vectors that hold a run of outputs.
__host__ __device__ constexpr int lane_of(Format f) {
  return f == Format::int4                            ? Nibbles::kLane
         : f == Format::int8                          ? Bytes::kLane
         : f == Format::f32 || f == Format::loose_f32 ? Plain<float>::kLane
                                                      : Plain<__half>::kLane;
}
__host__ __device__ constexpr int granule_of(Format f) {
  return f == Format::int4 ? Nibbles::kGranule : lane_of(f);
}

/// This block's share of the channels of a tile: take(column, sum). `at`: offset of the row and, once it has
/// been read, of the threads' sums.
template <class Take>
__device__ void add_product(const Args& a, const Tile& tile, int rank, const Channels& channels,
                            const Lines* skip, int at, const Take& take) {
  const Format format = skip ? skip->format : a.format;
  const int lane = lane_of(format);
  const Share share = share_of(tile, lane);
  const Place place =
      skip ? Place{0, tile.first * a.granule + share.column} : place_of(a, tile, share.column);
  add_format(format, channels, rank, share, skip ? *skip : a.part[place.part].lines, place.output, at);
  const auto* const sums = reinterpret_cast<const float*>(block_memory() + at);
  const int vectors = tile.columns / lane, pitch = sums_pitch(lane);
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < tile.columns; c += kThreads) {
    const int v = c / lane, i = c % lane;
    float total = 0;
#pragma unroll 4
    for (int t = v; t < kThreads; t += vectors) total = __fadd_rn(total, sums[t * pitch + i]);
    take(format == Format::int4 ? Nibbles::column(v, i) : c, total);
  }
  __syncthreads();
}

/// Adds a skip's share to total[column].
__device__ void add_skip(const Args& a, const Tile& tile, int rank, const SkipArgs& skip, int at,
                         float* total) {
  fetch_row<kThreads>(skip.x, skip.cols, reinterpret_cast<float*>(block_memory() + at));
  wait_for_row();
  const Channels all{true, 0, at + rank * 4, Own{rank, kGroup}.count(skip.cols)};
  add_product(a, tile, rank, all, &skip.lines, at,
              [&](int column, float sum) { total[column] = __fadd_rn(total[column], sum); });
}

/// The group's sums of a column, added in the order of the blocks, once they have come. A group's blocks are
/// in time: a grid has no more of them than there are multiprocessors, and the next kernel's start when all
/// of these have. Blocks of another engine on the device can hold theirs back for a while, no more than three
/// a launch.
__device__ float receive_sum(const uint64_t* sent, int columns, uint32_t stamp) {
  float part[kGroup];
  bool there;
  do {
    there = true;
#pragma unroll
    for (int r = 0; r < kGroup; ++r) there &= receive(sent + r * columns, stamp, part[r]);
  } while (!there);
  float sum = part[0];
#pragma unroll
  for (int r = 1; r < kGroup; ++r) sum = __fadd_rn(sum, part[r]);
  return sum;
}

/// The blocks' sums (group, tile.columns) to this block's outputs: sum, bias and y before, in this order.
__device__ void finish(const Args& a, const Tile& tile, int rank, const uint64_t* sent, uint32_t stamp) {
  const int length = (tile.half + kGroup - 1) / kGroup, first = rank * length;
  const auto output_of = [&](int column) {
    const Place place = place_of(a, tile, column);
    const Part& part = a.part[place.part];
    if (place.output >= part.out) return 0.0f;
    float* const y = part.y + place.output;
    const float bias = part.bias ? __ldg(part.bias + place.output) : 0,
                before = part.accumulate ? __ldcg(y) : 0;
    float sum = receive_sum(sent + column, tile.columns, stamp);
    if (part.bias) sum = __fadd_rn(sum, bias);
    if (part.accumulate) sum = __fadd_rn(sum, before);
    *y = sum;
    return sum;
  };
#pragma unroll 1
  for (int p = first + static_cast<int>(threadIdx.x); p < min(first + length, tile.half); p += kThreads) {
    const float value = output_of(p);
    if (!a.paired) continue;
    const float second = output_of(tile.half + p);
    const int output = tile.first * a.granule + p;
    if (output < a.part[0].out) a.glu.mid[output] = gated(value, second, a.glu.activation);
  }
}

__host__ __device__ inline int widest_tile(const Args& a) {
  return (a.granules + a.tiles - 1) / a.tiles * a.granule * (a.paired ? 2 : 1);
}
/// Bytes of what the skips add to the widest tile.
__host__ __device__ inline int skipped_bytes(const Args& a) {
  return a.skips > 0 ? padded_bytes(widest_tile(a), 4) : 0;
}

__global__ void __launch_bounds__(kThreads) gemv_kernel(const __grid_constant__ Args a) {
  const int block = static_cast<int>(blockIdx.x), rank = block % kGroup, group = block / kGroup;
  const int groups = static_cast<int>(gridDim.x) / kGroup;
  float* const skipped = floats_at(0);
  const RowMemory memory = row_memory(a.in, skipped_bytes(a), a.held);
  const int sums = sums_at(memory);
  fetch_weights<kThreads>(a.in, memory);
  wait_for_inputs(a.link);
#pragma unroll 1
  for (int t = group; t < a.tiles; t += groups) {
    const Tile tile = tile_at(a, t);
    if (a.skips > 0)
      for (int j = static_cast<int>(threadIdx.x); j < tile.columns; j += kThreads) skipped[j] = 0;
#pragma unroll 1
    for (int i = 0; i < a.skips; ++i) add_skip(a, tile, rank, a.skip[i], sums, skipped);
    // Sums take the row's place and keys that of their weights, so that every further tile makes it all
    // again.
    if (t != group) fetch_weights<kThreads>(a.in, memory);
    const Channels channels = prepare_row<kThreads>(a.in, memory, rank);
    start_next();  // not before: what it does there would hold the row up
    // Two places in turn: a block may be in the next tile while another still reads of this one. Not in the
    // one behind: it has received sums of all four since, for a quarter of a tile of several rounds (256
    // columns, 128 of a pair) is longer than what padding leaves out (127).
    const int round = t / groups;
    const uint32_t stamp = a.stamp + static_cast<uint32_t>(round);
    uint64_t* const sent = a.sent + (group * 2 + round % 2) * kGroup * widest_tile(a);
    add_product(a, tile, rank, channels, nullptr, sums, [&](int column, float sum) {
      if (a.skips > 0) sum = __fadd_rn(skipped[column], sum);
      send(sent + rank * tile.columns + column, sum, stamp);
    });
    finish(a, tile, rank, sent, stamp);
  }
  signal(a.link);
}

Format format_of(const Weight& w) {
  if (w.dtype == DType::int8) return Format::int8;
  if (w.dtype == DType::int4) return Format::int4;
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.out * dtype_size(w.dtype) % 16 == 0;
  if (w.dtype == DType::f32) return aligned ? Format::f32 : Format::loose_f32;
  if (w.dtype == DType::f16) return aligned ? Format::f16 : Format::loose_f16;
  return aligned ? Format::bf16 : Format::loose_bf16;
}
bool aligned(Format f) {
  return f < Format::loose_f32;
}
Lines lines_of(const Weight& w) {
  return {static_cast<const char*>(w.data), w.line_bytes(),
          static_cast<int>(quantised(w.dtype) ? padded_line(w.out) : w.out), format_of(w)};
}

int64_t sums_bytes(Format f) {
  return int64_t{kThreads} * sums_pitch(lane_of(f)) * 4;
}
constexpr int kMostColumns = 4096;  // of a tile

/// A block's memory where skips have sums of `turned` bytes; row: what a row that they read takes.
int64_t shared_bytes(const Input& in, bool held, int64_t turned, int64_t sums, int64_t row) {
  const RowMemory m = row_memory(in, static_cast<int>(turned), held);
  return std::max<int64_t>(m.end, sums_at(m) + std::max(sums, row));
}

/// How the outputs are shared out: evenly to groups of blocks, in as many rounds as it takes for every thread
/// to have a vector of `lane`.
void share_out(const Stream& s, Args& a, int lane) {
  const int groups = s.multiprocessors / kGroup;
  for (a.tiles = std::min(groups, a.granules);; a.tiles += groups) {
    const int widest = widest_tile(a);
    if (a.tiles >= a.granules || (widest <= kThreads * lane && widest <= kMostColumns)) return;
  }
}

}  // namespace

bool gemv_together(const Weight& a, const Weight& b) {
  return a.layout == Layout::channels && b.layout == Layout::channels && format_of(a) == format_of(b);
}

bool gemv_fuses(const Stream& s, const Input& in, const Weight& w) {
  return in.cols <= gemv_longest(s) &&
         shared_bytes(in, true, kMostColumns * 4, sums_bytes(format_of(w)), 0) <= s.shared_bytes;
}

int64_t gemv_longest(const Stream& s) {
  return (s.shared_bytes - kMostColumns * 4) / 8 * kGroup - kGroup * kWarp;
}

bool gemv_skips(const Stream& s, const Input& in, const Weight& w, const Weight& skip) {
  if (w.layout != Layout::channels || skip.layout != Layout::channels || w.out != skip.out ||
      !aligned(format_of(w)) || !aligned(format_of(skip)))
    return false;
  const int64_t sums = std::max(sums_bytes(format_of(w)), sums_bytes(format_of(skip)));
  return shared_bytes(in, true, kMostColumns * 4, sums, skip.in * 4) <= s.shared_bytes;
}

void gemv(const Stream& s, const Input& in, std::span<const Product> products, std::span<const Skip> skips,
          const Glu& glu, const Scratch& scratch, Chain& chain) {
  CHECK(!products.empty() && products.size() <= kMostProducts && skips.size() <= kMostSkips);
  Args a{};
  a.in = in;
  a.glu = glu;
  a.sent = scratch.sent;
  a.format = format_of(products[0].weight);
  a.granule = granule_of(a.format);
  a.paired = glu.mid != nullptr;
  a.held = gemv_fuses(s, in, products[0].weight);
  if (!a.held && in.cols > gemv_longest(s))
    fail("cuda: a row of ", in.cols, " entries is too long, expected at most ", gemv_longest(s));
  int64_t sums = sums_bytes(a.format), row = 0;
  int lane = lane_of(a.format);
  for (const Skip& skip : skips) {
    const SkipArgs& args =
        a.skip[a.skips++] = {skip.x, lines_of(skip.weight), static_cast<int>(skip.weight.in)};
    a.granule = std::max(a.granule, granule_of(args.lines.format));
    sums = std::max(sums, sums_bytes(args.lines.format));
    row = std::max(row, skip.weight.in * 4);
    lane = std::min(lane, lane_of(args.lines.format));
  }
  for (const Product& p : products) {
    a.part[a.parts++] = {lines_of(p.weight), p.weight.bias, p.y.data, static_cast<int>(p.weight.out),
                         a.granules,         p.accumulate};
    a.granules += (a.part[a.parts - 1].lines.padded + a.granule - 1) / a.granule;
  }
  if (a.paired) a.granules /= 2;
  share_out(s, a, lane);
  const int64_t shared = shared_bytes(in, a.held, skipped_bytes(a), sums, row);
  const int groups = std::min(a.tiles, s.multiprocessors / kGroup);
  CHECK(int64_t{2} * groups * kGroup * widest_tile(a) <= kMostSent);
  a.stamp = chain.stamps(static_cast<uint32_t>((a.tiles + groups - 1) / groups));
  a.link = chain.link(s);
  launch_kernel(s, gemv_kernel, groups * kGroup, kThreads,
                std::max(shared, std::min<int64_t>(kLeastShared, s.shared_bytes)), a);
  chain.launched(static_cast<unsigned>(groups * kGroup));
}

bool launches_may_depend() {
  return may_depend(gemv_kernel);
}

}  // namespace larosa::cuda
