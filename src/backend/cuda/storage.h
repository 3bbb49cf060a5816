// What callers hold of this backend: selections and caches.
#pragma once

#include <algorithm>
#include <memory>

#include "backend/backend.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/memory.h"
#include "base/error.h"

namespace larosa::cuda {

/// One row of a selection: the kept entries and zeros, and how many were kept.
struct StoredRow {
  explicit StoredRow(int64_t cols)
      : masked(static_cast<float*>(values.at_least(cols * 4))),
        kept(static_cast<int32_t*>(count.at_least(4))) {}
  Buffer values, count;
  float* const masked;
  int32_t* const kept;
};

/// Rows with zeros, as products take them. A row of its own may still wait to be made.
class CudaSelection final : public Selection {
 public:
  CudaSelection(int64_t most_rows, int64_t most_cols)
      : max_rows(most_rows), max_cols(most_cols), one(std::make_shared<StoredRow>(most_cols)) {}
  void reset(int64_t r, int64_t c) {
    CHECK(r <= max_rows && c <= max_cols);
    rows = r;
    cols = c;
    if (r == 1) return;
    values_.at_least(r * c * 4);
    count_.at_least(r * 4);
  }
  Mat mat() const { return Mat(rows == 1 ? one->masked : values_.get<float>(), rows, cols); }
  int32_t* kept() const { return rows == 1 ? one->kept : count_.get<int32_t>(); }

  const int64_t max_rows, max_cols;
  int64_t rows = 0, cols = 0;
  const std::shared_ptr<StoredRow> one;

 private:
  Buffer values_, count_;
};

/// By layer keys and values (G, capacity, E); with int8 behind all of them by layer the scales of both.
class CudaKvCache final : public KvCache {
 public:
  explicit CudaKvCache(const KvShape& s)
      : shape(s),
        positions(s.kv_heads * s.capacity),
        part(positions * s.head_dim * (s.dtype == DType::int8 ? 1 : dtype_size(s.dtype))),
        scales_at((2 * s.layers * part + 3) / 4 * 4),
        data(allocate_device(scales_at + (s.dtype == DType::int8 ? 2 * s.layers * positions * 4 : 0))) {}
  ~CudaKvCache() override { cudaFree(data); }
  CudaKvCache(const CudaKvCache&) = delete;
  CudaKvCache& operator=(const CudaKvCache&) = delete;
  int64_t bytes_per_token() const override { return shape.bytes_per_token(); }
  CacheLayer layer(int64_t l) const {
    char* const keys = static_cast<char*>(data) + 2 * l * part;
    CacheLayer layer;
    layer.keys = keys;
    layer.values = keys + part;
    layer.dtype = shape.dtype;
    layer.kv_heads = shape.kv_heads;
    layer.head_dim = shape.head_dim;
    layer.capacity = shape.capacity;
    if (shape.dtype == DType::int8) {
      layer.key_scales = reinterpret_cast<float*>(static_cast<char*>(data) + scales_at) + 2 * l * positions;
      layer.value_scales = layer.key_scales + positions;
    }
    return layer;
  }

  const KvShape shape;
  const int64_t positions;        // of one layer, all heads
  const int64_t part, scales_at;  // bytes of a layer's keys or values; where the scales begin
  void* const data;
};

}  // namespace larosa::cuda
