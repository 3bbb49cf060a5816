#include "backend/cpu/matmul.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "backend/cpu/isa.h"
#include "base/error.h"
#include "base/quant.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

// A block of rows: 1024 × 28672 inputs as bf16 are 59 MB. Weights that must be converted pass through panels
// of (kDepth, kWidth), at most 1.5 MB per thread, read once per block of rows.
constexpr int64_t kRows = 1024;
constexpr int64_t kWidth =
    384;  // 512 × 1024 … 384 × 1024 tiles: 214-224 GFLOP/s on 2 Zen 4 cores; 128: 174-206
constexpr int64_t kDepth = 1024;
constexpr int64_t kDepth16 = 4096;
constexpr size_t kMostPrimitives = 256;

/// oneDNN's own threads (OpenMP) stay at one while this lives: the pool has the cores.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) omp_set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

/// Outputs per tile: at least four tiles of a wide product, an even share for each, whole vectors (whole
/// blocks where quantised lines are cut).
int64_t tile_width(const Weight& w) {
  const int64_t grain = quantised(w.dtype) ? kQuantBlock : 16;
  const int64_t tiles = std::max<int64_t>(4, (w.out + kWidth - 1) / kWidth + 3) / 4 * 4;
  return std::min(w.out, std::max<int64_t>(64, ((w.out + tiles - 1) / tiles + grain - 1) / grain * grain));
}

}  // namespace

void sgemm(bool transposed, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
           const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  const OneThread one;
  CHECK(dnnl_sgemm('N', transposed ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) ==
        dnnl_success);
}

Matmul::Matmul(const Kernels& kernels, ThreadPool& pool)
    : kernels_(kernels),
      pool_(pool),
      native_bf16_(onednn_has_bf16()),
      engine_(dnnl::engine::kind::cpu, 0),
      scratch_(static_cast<size_t>(pool.size())) {}

void Matmul::run(Mat x, std::span<const Product> products, Products arithmetic) {
  arithmetic_ = arithmetic;
  tiles_.clear();
  for (const Product& p : products) {
    CHECK(p.weight.in == x.cols && p.y.cols == p.weight.out && p.y.rows == x.rows);
    const int64_t width = tile_width(p.weight);
    for (int64_t first = 0; first < p.weight.out; first += width) {
      tiles_.push_back({&p, first, std::min(width, p.weight.out - first)});
    }
  }
  for (int64_t t = 0; t < x.rows; t += kRows) {
    Mat rows = x.slice(t, std::min(kRows, x.rows - t));
    const bool bf16 = arithmetic_ == Products::bf16;
    if (bf16) round_rows(rows);
    if (bf16 && !native_bf16_) rows = Mat(rounded_.data(), rows.rows, rows.cols);
    std::atomic<size_t> next{0};
    pool_.run([&](int thread) {
      Scratch& scratch = scratch_[static_cast<size_t>(thread)];
      for (size_t i = next.fetch_add(1); i < tiles_.size(); i = next.fetch_add(1)) {
        const Tile& tile = tiles_[i];
        const Mat& all = tile.product->y;
        const Mat y(all.row(t) + tile.first, rows.rows, tile.count, all.stride);
        bf16&& native_bf16_ ? run_bf16(rows, tile, y, scratch) : run_f32(rows, tile, y, scratch);
        const float* bias = tile.product->weight.bias;
        for (int64_t r = 0; bias && r < y.rows; ++r) kernels_.add(bias + tile.first, tile.count, y.row(r));
      }
    });
  }
}

void Matmul::round_rows(Mat x) {
  const size_t size = static_cast<size_t>(x.rows * x.cols);
  if (rows16_.size() < size) rows16_.resize(size);
  if (!native_bf16_ && rounded_.size() < size) rounded_.resize(size);
  pool_.split(x.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      uint16_t* row = &rows16_[static_cast<size_t>(t * x.cols)];
      kernels_.narrow(x.row(t), DType::bf16, x.cols, row);
      if (!native_bf16_) kernels_.widen(row, DType::bf16, x.cols, &rounded_[static_cast<size_t>(t * x.cols)]);
    }
  });
}

/// Inputs [k0, k0 + k) of the tile's outputs as float32, in the weight's own layout.
void Matmul::widen_panel(const Weight& w, const Tile& tile, int64_t k0, int64_t k, Scratch& scratch) const {
  const bool rows = w.layout == Layout::rows;
  const int64_t lines = rows ? tile.count : k, length = rows ? k : tile.count;
  const size_t size = static_cast<size_t>(lines * length);
  if (scratch.panel.size() < size) scratch.panel.resize(size);
  for (int64_t i = 0; i < lines; ++i) {
    kernels_.widen_line(w, (rows ? tile.first : k0) + i, rows ? k0 : tile.first, length,
                        &scratch.panel[static_cast<size_t>(i * length)]);
  }
  if (arithmetic_ == Products::bf16 && w.dtype != DType::bf16) {
    if (scratch.panel16.size() < size) scratch.panel16.resize(size);
    kernels_.narrow(scratch.panel.data(), DType::bf16, lines * length, scratch.panel16.data());
    kernels_.widen(scratch.panel16.data(), DType::bf16, lines * length, scratch.panel.data());
  }
}

/// The same as bf16.
void Matmul::narrow_panel(const Weight& w, const Tile& tile, int64_t k0, int64_t k, Scratch& scratch) const {
  const bool rows = w.layout == Layout::rows;
  const int64_t lines = rows ? tile.count : k, length = rows ? k : tile.count;
  if (scratch.panel.size() < static_cast<size_t>(length)) scratch.panel.resize(static_cast<size_t>(length));
  if (scratch.panel16.size() < static_cast<size_t>(lines * length)) {
    scratch.panel16.resize(static_cast<size_t>(lines * length));
  }
  for (int64_t i = 0; i < lines; ++i) {
    kernels_.widen_line(w, (rows ? tile.first : k0) + i, rows ? k0 : tile.first, length,
                        scratch.panel.data());
    kernels_.narrow(scratch.panel.data(), DType::bf16, length,
                    &scratch.panel16[static_cast<size_t>(i * length)]);
  }
}

void Matmul::run_f32(Mat x, const Tile& tile, Mat y, Scratch& scratch) const {
  const Weight& w = tile.product->weight;
  const bool rows = w.layout == Layout::rows;
  const bool direct = w.dtype == DType::f32 && arithmetic_ == Products::f32;
  const int64_t depth = direct ? w.in : kDepth;
  for (int64_t k0 = 0; k0 < w.in; k0 += depth) {
    const int64_t k = std::min(depth, w.in - k0);
    const float* b = nullptr;
    int64_t ldb = rows ? k : tile.count;
    if (direct) {
      b = static_cast<const float*>(w.data) + (rows ? tile.first * w.in : tile.first);
      ldb = rows ? w.in : w.out;
    } else {
      widen_panel(w, tile, k0, k, scratch);
      b = scratch.panel.data();
    }
    const float beta = k0 > 0 || tile.product->accumulate ? 1.0f : 0.0f;
    sgemm(rows, x.rows, tile.count, k, 1.0f, x.data + k0, x.stride, b, ldb, beta, y.data, y.stride);
  }
}

void Matmul::run_bf16(Mat x, const Tile& tile, Mat y, Scratch& scratch) {
  const OneThread one;
  const Weight& w = tile.product->weight;
  const bool rows = w.layout == Layout::rows, direct = w.dtype == DType::bf16;
  for (int64_t k0 = 0; k0 < w.in; k0 += kDepth16) {
    const int64_t k = std::min(kDepth16, w.in - k0);
    const uint16_t* b = nullptr;
    int64_t ldb = rows ? k : tile.count;
    if (direct) {
      b = static_cast<const uint16_t*>(w.data) + (rows ? tile.first * w.in + k0 : k0 * w.out + tile.first);
      ldb = rows ? w.in : w.out;
    } else {
      narrow_panel(w, tile, k0, k, scratch);
      b = scratch.panel16.data();
    }
    const bool add = k0 > 0 || tile.product->accumulate;
    const Primitive p = primitive({x.rows, tile.count, k, x.cols, ldb, y.stride, rows, add});
    scratch.onednn.resize(std::max(scratch.onednn.size(), p.scratch.get_size()));
    dnnl::stream stream(engine_);
    p.run.execute(stream, {{DNNL_ARG_SRC, dnnl::memory(p.x, engine_, rows16_.data() + k0)},
                           {DNNL_ARG_WEIGHTS, dnnl::memory(p.w, engine_, const_cast<uint16_t*>(b))},
                           {DNNL_ARG_DST, dnnl::memory(p.y, engine_, y.data)},
                           {DNNL_ARG_SCRATCHPAD, dnnl::memory(p.scratch, engine_, scratch.onednn.data())}});
    stream.wait();
  }
}

/// Made once per shape: making one costs as much as running it.
Matmul::Primitive Matmul::primitive(const Shape& shape) {
  const std::lock_guard lock(mutex_);
  if (const auto found = primitives_.find(shape); found != primitives_.end()) return found->second;
  const auto [m, n, k, ldx, ldw, ldy, rows, add] = shape;
  using Memory = dnnl::memory;
  const Memory::desc x({m, k}, Memory::data_type::bf16, Memory::dims{ldx, 1});
  const Memory::desc w({k, n}, Memory::data_type::bf16, rows ? Memory::dims{1, ldw} : Memory::dims{ldw, 1});
  const Memory::desc y({m, n}, Memory::data_type::f32, Memory::dims{ldy, 1});
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (add) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), attributes, engine_);
  if (primitives_.size() >= kMostPrimitives) primitives_.clear();  // prompts of every length make new ones
  return primitives_[shape] = {x, w, y, description.scratchpad_desc(), dnnl::matmul(description)};
}

}  // namespace larosa
