// What callers hold of this backend: selections and caches.
#pragma once

#include <algorithm>
#include <memory>

#include "backend/backend.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/memory.h"
#include "base/error.h"

namespace larosa::cuda {

/// A list, with the memory behind it.
struct StoredList {
  explicit StoredList(int64_t cols) {
    list.index = static_cast<int32_t*>(index.at_least(cols * 4));
    list.value = static_cast<float*>(value.at_least(cols * 4));
    list.counts = static_cast<int32_t*>(counts.at_least(8));
  }
  Buffer index, value, counts;
  List list;
};

/// One row: the list of what was kept. Several: the rows with zeros, as products take them.
class CudaSelection final : public Selection {
 public:
  CudaSelection(int64_t most_rows, int64_t most_cols)
      : max_rows(most_rows), max_cols(most_cols), one(std::make_shared<StoredList>(most_cols)) {}
  void reset(int64_t r, int64_t c) {
    CHECK(r <= max_rows && c <= max_cols);
    rows = r;
    cols = c;
    if (r == 1) return;
    masked.at_least(r * c * 4);
    kept.at_least(r * 4);
  }
  Mat mat() const { return Mat(masked.get<float>(), rows, cols); }

  const int64_t max_rows, max_cols;
  int64_t rows = 0, cols = 0;
  std::shared_ptr<StoredList> one;
  Buffer masked, kept;
};

class CudaKvCache final : public KvCache {
 public:
  explicit CudaKvCache(const KvShape& s) : shape(s), data(allocate_device(s.capacity * bytes_per_token())) {}
  ~CudaKvCache() override { cudaFree(data); }
  CudaKvCache(const CudaKvCache&) = delete;
  CudaKvCache& operator=(const CudaKvCache&) = delete;
  int64_t bytes_per_token() const override {
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype_size(shape.dtype);
  }
  CacheLayer layer(int64_t l) const {
    const int64_t size = shape.kv_heads * shape.capacity * shape.head_dim * dtype_size(shape.dtype);
    char* keys = static_cast<char*>(data) + 2 * l * size;
    return {keys, keys + size, shape.dtype, shape.kv_heads, shape.head_dim, shape.capacity};
  }

  const KvShape shape;
  void* const data;
};

}  // namespace larosa::cuda
