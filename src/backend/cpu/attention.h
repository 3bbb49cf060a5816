// The KV cache and attention over it: which thread does which heads and positions.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace larosa {

/// Chunks of kChunk positions, taken as the timeline grows; nothing is ever copied.
class CpuKvCache final : public KvCache {
 public:
  static constexpr int64_t kChunk = 256;

  explicit CpuKvCache(const KvShape& shape);
  int64_t bytes_per_token() const override;
  const KvShape& shape() const { return shape_; }
  /// Makes room for positions [0, end) of a layer.
  void reserve(int64_t layer, int64_t end);
  /// Key/value head g from position `slot` of a chunk on; positions follow one another.
  StoredHead keys(int64_t layer, int64_t chunk, int64_t g, int64_t slot = 0) const {
    return head(layer, chunk, g, slot);
  }
  StoredHead values(int64_t layer, int64_t chunk, int64_t g, int64_t slot = 0) const {
    return head(layer, chunk, shape_.kv_heads + g, slot);
  }

 private:
  StoredHead head(int64_t layer, int64_t chunk, int64_t index, int64_t slot) const;

  KvShape shape_;
  std::vector<std::vector<std::unique_ptr<std::byte[]>>>
      chunks_;  // per layer: keys (G, kChunk, E), values, with int8 their scales (2 G, kChunk)
};

class Attention {
 public:
  Attention(const Kernels& kernels, ThreadPool& pool);
  void run(Mat q, Mat k, Mat v, CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window, Mat out);

 private:
  void store(const float* x, const KvShape& shape, StoredHead to) const;
  const float* widen(StoredHead head, const KvShape& shape, int64_t n, float* room) const;
  void append(Mat k, Mat v, CpuKvCache& cache, int64_t layer, int64_t pos);
  void few_rows(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window, Mat out);
  void many_rows(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window, Mat out);
  void query_block(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window, int64_t g,
                   Mat out, std::vector<float>& scratch) const;

  const Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<std::vector<float>> scratch_;  // per thread
  std::vector<float> partial_;               // few_rows: (T, H, segments, E + 2)
};

}  // namespace larosa
