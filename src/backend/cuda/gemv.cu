// The decoding product: one row times weights in channels layout. A group of blocks has a range of the
// outputs, its tile. Each block has its own channels of it, which its threads share, 16 bytes of outputs
// each, and their sums are added in a fixed order: in the block, then over the blocks of the group, which
// send them to each other. Skips have groups of their own beside those of the product.
#include <algorithm>

#include "backend/cuda/channels.cuh"
#include "backend/cuda/launch.h"
#include "base/error.h"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

struct Part {
  Lines lines;
  const float* bias;
  float* y;
  int out, first;  // first: column of the launch where it begins
  bool accumulate;
};

static_assert(kMostSkips == 2);  // work_at, gemv_kernel
struct SkipArgs {
  const float* x;
  Lines lines;
  int cols;
  Splits splits;
};

struct Args {
  Part part[kMostProducts];
  int parts;
  Format format;  // of every part
  Deal deal;
  Splits splits;
  bool paired;  // a tile has the same outputs of both parts
  bool held;    // a block's memory holds the row
  int skips;
  SkipArgs skip[kMostSkips];
  Deal skip_deal;  // of the skips' outputs, to the groups behind
  Glu glu;
  Input in;
  uint64_t *sent, *skip_sent;
  uint32_t stamp;  // of the first round of tiles, and of the skips'
  Link link;
};

/// Columns are counted over all parts; a part's are its outputs in the order in which vectors have them.
struct Place {
  int part, column;
};
__device__ Place place_of(const Args& a, const Tile& tile, int column) {
  if (a.paired) {
    const int part = column >= tile.half;
    return {part, tile.first + column - part * tile.half};
  }
  const int of_all = tile.first + column;
  int p = 0;
#pragma unroll 1
  while (p + 1 < a.parts && of_all >= a.part[p + 1].first) ++p;
  return {p, of_all - a.part[p].first};
}

/// What a block and its threads do for a tile: all that can be worked out before the row is there.
struct Work {
  Tile tile;
  const Lines* lines;  // of the thread's vector
  Share share;
  int column;      // of the thread's vector in its weight
  uint64_t* sent;  // a tile's sums, or all of a skip's, and from one block's to the next one's
  int pitch;
};

/// The block's share of the channels of a tile, to its group: by column, a skip's by output.
__device__ void send_product(const Work& w, bool product, int rank, const Channels& channels,
                             uint32_t stamp) {
  const Format format = w.lines->format;
  add_format(format, channels, rank, w.share, *w.lines, w.column);
  const auto* const sums = reinterpret_cast<const float*>(block_memory());
  const int shift = lane_shift(format), pitch = sums_pitch(1 << shift);
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < w.tile.columns; c += kRowThreads) {
    const int v = c >> shift, i = c & ((1 << shift) - 1);
    float total = 0;
#pragma unroll 8
    for (int t = v; t < kRowThreads; t += w.share.vectors) total = __fadd_rn(total, sums[t * pitch + i]);
    const int at = product ? c : output_of(format, w.tile.first + c);
    send(w.sent + rank * w.pitch + at, total, stamp);
  }
  __syncthreads();
}

/// The sums of an output by a group's blocks, `pitch` apart: true once all have come.
__device__ bool receive_parts(const uint64_t* sent, int pitch, uint32_t stamp, float (&part)[kGroup]) {
  bool there = true;
#pragma unroll
  for (int r = 0; r < kGroup; ++r) there &= receive(sent + r * pitch, stamp, part[r]);
  return there;
}
__device__ float sum_of(const float (&part)[kGroup]) {
  float sum = part[0];
#pragma unroll
  for (int r = 1; r < kGroup; ++r) sum = __fadd_rn(sum, part[r]);
  return sum;
}
/// What the groups' blocks have of an output, once it has come: of the product in the order of the blocks,
/// and of each skip. They are in time: a grid has no more blocks than there are multiprocessors, and the next
/// kernel's start when all of these have. Blocks of another engine on the device can hold theirs back for a
/// while, no more than three a launch.
__device__ float receive_sum(const Args& a, const Work& w, uint32_t stamp, int column, int output) {
  const uint64_t* const sent = w.sent + column;
  float part[kGroup];
  if (a.skips == 0) {
    while (!receive_parts(sent, w.pitch, stamp, part)) {
    }
    return sum_of(part);
  }
  const int pitch = a.skip_deal.outputs();
  float skipped = 0;
#pragma unroll 1
  for (int i = 0; i < a.skips; ++i) {
    const uint64_t* const skip = a.skip_sent + i * kGroup * pitch + output;
    float other[kGroup];
    while (!(receive_parts(skip, pitch, a.stamp, other) & receive_parts(sent, w.pitch, stamp, part))) {
    }
    skipped = __fadd_rn(skipped, sum_of(other));
  }
  return __fadd_rn(sum_of(part), skipped);
}

/// Of a tile of two parts both sums of an output, which come together.
__device__ void receive_pair(const Work& w, uint32_t stamp, int column, float& first, float& second) {
  const uint64_t* const sent = w.sent + column;
  float part[kGroup], other[kGroup];
  while (!(receive_parts(sent, w.pitch, stamp, part) &
           receive_parts(sent + w.tile.half, w.pitch, stamp, other))) {
  }
  first = sum_of(part), second = sum_of(other);
}

/// What came of the tile to this block's outputs: sum, bias and y before, in this order.
__device__ void finish(const Args& a, const Work& w, int rank, uint32_t stamp) {
  const Tile& tile = w.tile;
  const int length = (tile.half + kGroup - 1) / kGroup, first = rank * length;
#pragma unroll 1
  for (int p = first + static_cast<int>(threadIdx.x); p < min(first + length, tile.half); p += kRowThreads) {
    const Place place = place_of(a, tile, p);
    const Part& part = a.part[place.part];
    const int output = output_of(a.format, place.column);
    if (output >= part.out) continue;
    float* const y = part.y + output;
    const float bias = part.bias ? __ldg(part.bias + output) : 0, before = part.accumulate ? __ldcg(y) : 0;
    float sum, second = 0;
    if (a.paired) {
      receive_pair(w, stamp, p, sum, second);
    } else {
      sum = receive_sum(a, w, stamp, p, output);
    }
    if (part.bias) sum = __fadd_rn(sum, bias);
    if (part.accumulate) sum = __fadd_rn(sum, before);
    *y = sum;
    if (!a.paired) continue;
    const Part& other = a.part[1];
    if (other.bias) second = __fadd_rn(second, __ldg(other.bias + output));
    other.y[output] = second;
    a.glu.mid[output] = gated(sum, second, a.glu.activation);
  }
}

__host__ __device__ inline int widest_tile(const Args& a) {
  return a.deal.widest() * (a.paired ? 2 : 1);
}

/// Of tile t of the product's, in this round, or of the skips', one skip after the other.
__device__ Work work_at(const Args& a, bool product, int group, int t, int round) {
  Work w;
  if (product) {
    w.tile = tile_at(a.deal, t, a.paired);
    const Split& split = t < a.deal.larger ? a.splits.larger : a.splits.usual;
    w.share = share_of(split, lane_of(a.format));
    const Place place = place_of(a, w.tile, w.share.column);
    w.lines = &a.part[place.part].lines;
    w.column = place.column;
    // Two places in turn: a block may be in the next tile while another still reads of this one. Not in the
    // one behind: it has received sums of all four since, for a quarter of a tile of several rounds (256
    // columns of f32, 512 of the others, half of it of a pair) is longer than what padding leaves out (127 of
    // quantised lines, whose blocks of 128 columns all begin with a real output).
    w.pitch = w.tile.columns;
    w.sent = a.sent + (group * 2 + round % 2) * kGroup * widest_tile(a);
  } else {
    const int i = t >= a.skip_deal.tiles;
    t -= i * a.skip_deal.tiles;
    const SkipArgs& skip = a.skip[i];
    w.tile = tile_at(a.skip_deal, t, false);
    const Split& split = t < a.skip_deal.larger ? skip.splits.larger : skip.splits.usual;
    w.share = share_of(split, lane_of(skip.lines.format));
    w.lines = &skip.lines;
    w.column = w.tile.first + w.share.column;
    w.pitch = a.skip_deal.outputs();
    w.sent = a.skip_sent + i * kGroup * w.pitch;
  }
  return w;
}

__device__ Input plain(const SkipArgs& skip) {
  Input in;
  in.x = skip.x;
  in.cols = skip.cols;
  return in;
}

/// A block of a product, or of the skips: these need no selection, so they read while those still look for
/// their channels.
__global__ void __launch_bounds__(kRowThreads) gemv_kernel(const __grid_constant__ Args a) {
  const int block = static_cast<int>(blockIdx.x), rank = block % kGroup;
  const bool product = block < a.deal.groups * kGroup;
  const Deal& deal = product ? a.deal : a.skip_deal;
  const int group = block / kGroup - (product ? 0 : a.deal.groups);
  const int end = product ? deal.tiles : deal.tiles * a.skips;
  const RowMemory memory = row_memory(a.in, a.held);
  if (product) begin_row(a.in, memory);
  int t = group, round = 0;
  Work work = work_at(a, product, group, t, round);
  wait_for_inputs_in_memory(a.link);
#pragma unroll 1
  for (;;) {
    const Input in = product ? a.in : plain(a.skip[t >= deal.tiles]);
    const Channels channels =
        prepare_row(in, product ? memory : row_memory(in, true), a.held || !product, rank);
    start_next();  // not before: what it does there would hold the row up
    const uint32_t stamp = a.stamp + static_cast<uint32_t>(product ? round : 0);
    send_product(work, product, rank, channels, stamp);
    if (product) finish(a, work, rank, stamp);
    t += deal.groups, ++round;
    if (t >= end) break;
    // Sums took the place of all there was: every further tile makes it again.
    if (product) begin_row(a.in, memory);
    work = work_at(a, product, group, t, round);
    __syncthreads();
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
  return int64_t{kRowThreads} * sums_pitch(lane_of(f)) * 4;
}
/// A block's memory for a product.
int64_t shared_bytes(const Input& in, bool held, Format format) {
  return std::max<int64_t>(row_memory(in, held).end, sums_bytes(format));
}
/// And for a skip.
int64_t skip_shared_bytes(const Weight& skip) {
  return std::max<int64_t>(sums_bytes(format_of(skip)), list_bytes(static_cast<int>(skip.in)));
}

/// Bytes of a weight that a row reads, as far as the host knows, as bytes of 16-bit elements: a block read 31
/// KB of these in a microsecond, 24 of quantised ones, before loads came in halves. Since then 1.1 and 1.5
/// are no better (docs/cuda.md).
double bytes_read(const Weight& w, const Input& in) {
  const double kept = in.select == Selects::topk        ? in.keep
                      : in.select == Selects::threshold ? 0.5 * in.cols
                                                        : in.cols;
  return kept * static_cast<double>(w.line_bytes()) * (quantised(w.dtype) ? 1.3 : 1);
}

/// What a group could read while it selects, in 2.4 µs. A row that is kept whole counts as one that selects
/// nothing: it has the same bits.
constexpr double kSelecting = 300e3;

}  // namespace

bool gemv_together(const Weight& a, const Weight& b) {
  return a.layout == Layout::channels && b.layout == Layout::channels && format_of(a) == format_of(b);
}

bool gemv_fuses(const Stream& s, const Input& in, const Weight& w) {
  return in.cols <= kMostHeld && shared_bytes(in, true, format_of(w)) <= s.shared_bytes;
}

int64_t gemv_longest(const Stream& s) {
  return s.shared_bytes / 8 * kGroup - kGroup * kWarp;
}

bool gemv_skips(const Stream& s, const Weight& w, const Weight& skip) {
  if (w.layout != Layout::channels || skip.layout != Layout::channels || w.out != skip.out ||
      !aligned(format_of(w)) || !aligned(format_of(skip)))
    return false;
  return s.multiprocessors >= 2 * kGroup && skip.in <= kMostHeld &&
         kMostSkips * kGroup * skip.out <= kMostSent / 4 && skip_shared_bytes(skip) <= s.shared_bytes;
}

void gemv(const Stream& s, const Input& in, std::span<const Product> products, std::span<const Skip> skips,
          const Glu& glu, uint64_t* sent, Chain& chain) {
  CHECK(!products.empty() && products.size() <= kMostProducts && skips.size() <= kMostSkips);
  Args a{};
  a.in = in;
  a.glu = glu;
  a.format = format_of(products[0].weight);
  a.paired = glu.mid != nullptr;
  CHECK(!a.paired || (products.size() == 2 && !products[1].accumulate));
  CHECK(skips.empty() || products.size() == 1);
  a.held = gemv_fuses(s, in, products[0].weight);
  if (!a.held && in.cols > gemv_longest(s))
    fail("cuda: a row of ", in.cols, " entries is too long, expected at most ", gemv_longest(s));
  CHECK(a.held || (in.source == Source::row && in.select == Selects::all));
  int64_t shared = shared_bytes(in, a.held, a.format);
  double bytes = 0, skip_bytes = 0;
  a.deal.granule = granule_of(a.format);
  for (const Product& p : products) {
    a.part[a.parts++] = {lines_of(p.weight), p.weight.bias, p.y.data, static_cast<int>(p.weight.out),
                         a.deal.outputs(),   p.accumulate};
    a.deal.granules += (a.part[a.parts - 1].lines.padded + a.deal.granule - 1) / a.deal.granule;
    bytes += bytes_read(p.weight, in);
  }
  if (a.paired) a.deal.granules /= 2;
  int lane = 1 << 30, padded = 0;
  for (const Skip& skip : skips) {
    const SkipArgs& args =
        a.skip[a.skips++] = {skip.x, lines_of(skip.weight), static_cast<int>(skip.weight.in), {}};
    a.skip_deal.granule = std::max(a.skip_deal.granule, granule_of(args.lines.format));
    padded = std::max(padded, args.lines.padded);
    lane = std::min(lane, lane_of(args.lines.format));
    skip_bytes += bytes_read(skip.weight, Input{.cols = static_cast<int>(skip.weight.in)});
    shared = std::max(shared, skip_shared_bytes(skip.weight));
  }
  const int groups = s.multiprocessors / kGroup;
  a.deal.groups = groups;
  if (a.skips > 0) {
    const int granule = a.skip_deal.granule;
    a.skip_deal.granules = (padded + granule - 1) / granule;
    a.skip_deal.groups =
        std::min(skip_groups(groups, a.deal, bytes, keeps_all(in) ? 0 : kSelecting, a.skip_deal, skip_bytes),
                 a.skip_deal.granules);
    deal_out(a.skip_deal, kRowThreads, lane, false);
    for (SkipArgs& skip : std::span(a.skip, static_cast<size_t>(a.skips)))
      skip.splits = splits_of(a.skip_deal, kRowThreads, lane_of(skip.lines.format), false);
    a.deal.groups -= a.skip_deal.groups;
  }
  deal_out(a.deal, kRowThreads, lane_of(a.format), a.paired);
  a.deal.groups = std::min(a.deal.tiles, a.deal.groups);
  a.splits = splits_of(a.deal, kRowThreads, lane_of(a.format), a.paired);
  const int blocks = kGroup * (a.deal.groups + a.skip_deal.groups);
  const int64_t skip_sent = int64_t{kGroup} * a.skips * a.skip_deal.outputs();
  CHECK(int64_t{2} * a.deal.groups * kGroup * widest_tile(a) + skip_sent <= kMostSent);
  a.sent = sent;
  a.skip_sent = sent + (kMostSent - skip_sent);
  const int makers = a.deal.groups * kGroup;
  a.in.left = (in.cols + makers - 1) / makers;
  a.stamp = chain.stamps(static_cast<uint32_t>((a.deal.tiles + a.deal.groups - 1) / a.deal.groups));
  a.link = chain.link(s);
  launch_kernel(s, gemv_kernel, blocks, kRowThreads, std::max(shared, shared_alone(s)), a);
  chain.launched(static_cast<unsigned>(blocks));
}

bool launches_may_depend() {
  return may_depend(gemv_kernel);
}

}  // namespace larosa::cuda
