// Products over many rows: oneDNN on tiles of fixed shape, one thread per tile. Tiles depend on the problem
// alone, so the number of threads changes no bit.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <span>
#include <tuple>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "oneapi/dnnl/dnnl.hpp"

namespace larosa {

/// C (m, n) = alpha · A (m, k) · B + beta · C in float32 on the calling thread alone; B is (k, n), or (n, k)
/// where transposed. Leading dimensions in elements.
void sgemm(bool transposed, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
           const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

class Matmul {
 public:
  Matmul(const Kernels& kernels, ThreadPool& pool);

  /// For every product: y = x Wᵀ (+ bias) (+ y).     x (T, D)
  void run(Mat x, std::span<const Product> products, Products arithmetic);

 private:
  struct Tile {
    const Product* product;
    int64_t first, count;  // outputs
  };
  /// Buffers of one thread, bounded by the tile's shape.
  struct Scratch {
    std::vector<float> panel;       // (k, n) or (n, k)
    std::vector<uint16_t> panel16;  // the same as bf16
    std::vector<std::byte> onednn;
  };
  using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;
  struct Primitive {
    dnnl::memory::desc x, w, y, scratch;
    dnnl::matmul run;
  };

  void round_rows(Mat x);
  void run_f32(Mat x, const Tile& tile, Mat y, Scratch& scratch) const;
  void run_bf16(Mat x, const Tile& tile, Mat y, Scratch& scratch);
  void widen_panel(const Weight& w, const Tile& tile, int64_t k0, int64_t k, Scratch& scratch) const;
  void narrow_panel(const Weight& w, const Tile& tile, int64_t k0, int64_t k, Scratch& scratch) const;
  Primitive primitive(const Shape& shape);

  Products arithmetic_ = Products::f32;  // of the run in progress
  const Kernels& kernels_;
  ThreadPool& pool_;
  const bool native_bf16_;
  dnnl::engine engine_;
  std::vector<Scratch> scratch_;  // per thread
  std::vector<uint16_t> rows16_;  // rows of one block as bf16
  std::vector<float> rounded_;    // the same widened, where bf16 is not native
  std::vector<Tile> tiles_;
  std::mutex mutex_;
  std::map<Shape, Primitive> primitives_;
};

}  // namespace larosa
