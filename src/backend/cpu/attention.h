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
  /// Position `slot` of a chunk, for key/value head g.   (kChunk, E) follow one another
  std::byte* keys(int64_t layer, int64_t chunk, int64_t g, int64_t slot = 0) const;
  std::byte* values(int64_t layer, int64_t chunk, int64_t g, int64_t slot = 0) const;

 private:
  KvShape shape_;
  std::vector<std::vector<std::unique_ptr<std::byte[]>>>
      chunks_;  // per layer: keys (G, kChunk, E), then values
};

class Attention {
 public:
  Attention(const Kernels& kernels, ThreadPool& pool);
  void run(Mat q, Mat k, Mat v, CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window, Mat out);

 private:
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
