#include "backend/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "backend/cpu/matmul.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

constexpr int64_t kChunk = CpuKvCache::kChunk;
constexpr int64_t kSegment = 4 * kChunk;  // positions of one unit of work when decoding
constexpr int64_t kQueries = 64;          // rows of one unit of work in a prompt
constexpr int64_t kFewRows = 8;           // below: one query at a time
static_assert(kChunk <= kAttendStride);
constexpr float kLowest = std::numeric_limits<float>::lowest();

int64_t first_key(int64_t position, int64_t window) {
  return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
}

}  // namespace

CpuKvCache::CpuKvCache(const KvShape& shape) : shape_(shape), chunks_(static_cast<size_t>(shape.layers)) {
  CHECK(std::ranges::count(kKvTypes, shape.dtype) == 1);
}

int64_t CpuKvCache::bytes_per_token() const {
  return shape_.bytes_per_token();
}

void CpuKvCache::reserve(int64_t layer, int64_t end) {
  auto& chunks = chunks_[static_cast<size_t>(layer)];
  const int64_t bytes = 2 * shape_.kv_heads * kChunk * kv_bytes(shape_.dtype, shape_.head_dim);
  while (static_cast<int64_t>(chunks.size()) * kChunk < end) {
    chunks.push_back(std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(bytes)));
  }
}

StoredHead CpuKvCache::head(int64_t layer, int64_t chunk, int64_t index, int64_t slot) const {
  std::byte* base = chunks_[static_cast<size_t>(layer)][static_cast<size_t>(chunk)].get();
  const int64_t at = index * kChunk + slot, width = shape_.head_dim;
  if (shape_.dtype != DType::int8) return {base + at * width * dtype_size(shape_.dtype), nullptr};
  const auto* scales = reinterpret_cast<const float*>(base + 2 * shape_.kv_heads * kChunk * width);
  return {base + at * width, scales + at};
}

Attention::Attention(const Kernels& kernels, ThreadPool& pool)
    : kernels_(kernels), pool_(pool), scratch_(static_cast<size_t>(pool.size())) {}

void Attention::run(Mat q, Mat k, Mat v, CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window,
                    Mat out) {
  const KvShape& shape = cache.shape();
  CHECK(layer >= 0 && layer < shape.layers && pos >= 0 && pos + q.rows <= shape.capacity);
  CHECK(q.cols % (shape.kv_heads * shape.head_dim) == 0 && out.rows == q.rows && out.cols == q.cols);
  append(k, v, cache, layer, pos);
  q.rows < kFewRows ? few_rows(q, cache, layer, pos, window, out)
                    : many_rows(q, cache, layer, pos, window, out);
}

/// One head's key or value at the place that keys() or values() gave.
void Attention::store(const float* x, const KvShape& shape, StoredHead to) const {
  void* data = const_cast<void*>(to.data);
  if (shape.dtype != DType::int8) return kernels_.narrow(x, shape.dtype, shape.head_dim, data);
  *const_cast<float*>(to.scale) = kernels_.quantise_head(x, shape.head_dim, static_cast<int8_t*>(data));
}

void Attention::append(Mat k, Mat v, CpuKvCache& cache, int64_t layer, int64_t pos) {
  const KvShape& shape = cache.shape();
  CHECK(k.cols == shape.kv_heads * shape.head_dim && v.cols == k.cols && k.rows == v.rows);
  cache.reserve(layer, pos + k.rows);
  const auto store_rows = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t chunk = (pos + t) / kChunk, slot = (pos + t) % kChunk;
      for (int64_t g = 0; g < shape.kv_heads; ++g) {
        const int64_t at = g * shape.head_dim;
        store(k.row(t) + at, shape, cache.keys(layer, chunk, g, slot));
        store(v.row(t) + at, shape, cache.values(layer, chunk, g, slot));
      }
    }
  };
  k.rows < kFewRows ? store_rows(0, k.rows) : pool_.split(k.rows, 1, store_rows);
}

/// Decoding: a unit is one row, one key/value head and one segment of positions. Segments lie at fixed
/// positions and are joined in order, so the result does not depend on who did which.
void Attention::few_rows(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window,
                         Mat out) {
  const KvShape& shape = cache.shape();
  const int64_t width = shape.head_dim, heads = q.cols / width, group = heads / shape.kv_heads;
  const int64_t segments = (pos + q.rows - 1) / kSegment + 1, stride = width + 2;
  const int64_t units = q.rows * shape.kv_heads * segments;
  partial_.resize(std::max(partial_.size(), static_cast<size_t>(q.rows * heads * segments * stride)));
  const auto part = [&](int64_t t, int64_t h, int64_t s) {
    return &partial_[static_cast<size_t>(((t * heads + h) * segments + s) * stride)];
  };
  const auto work = [&](int64_t unit, float* score) {
    const int64_t s = unit % segments, g = unit / segments % shape.kv_heads,
                  t = unit / segments / shape.kv_heads;
    const int64_t begin = std::max(s * kSegment, first_key(pos + t, window));
    const int64_t end = std::min((s + 1) * kSegment, pos + t + 1);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      float* state = part(t, h, s);
      std::fill_n(state, stride, 0.0f);
      state[0] = kLowest;
    }
    for (int64_t j = begin; j < end;) {
      const int64_t chunk = j / kChunk, n = std::min(end, (chunk + 1) * kChunk) - j;
      kernels_.attend_group(q.row(t) + g * group * width, cache.keys(layer, chunk, g, j % kChunk),
                            cache.values(layer, chunk, g, j % kChunk), shape.dtype, n, width, group, score,
                            part(t, g * group, s), segments * stride);
      j += n;
    }
  };
  std::atomic<int64_t> next{0};
  const auto run_units = [&](int thread) {
    std::vector<float>& scratch = scratch_[static_cast<size_t>(thread)];
    if (scratch.size() < kAttendScore) scratch.resize(kAttendScore);
    for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) work(i, scratch.data());
  };
  // Below some 32 K multiply-adds a second thread costs more than it brings.
  (pos + q.rows) * q.rows* q.cols < 32768 ? run_units(0) : pool_.run(run_units);
  for (int64_t t = 0; t < q.rows; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      float top = kLowest, sum = 0;
      for (int64_t s = 0; s < segments; ++s) top = std::max(top, part(t, h, s)[0]);
      float* mean = out.row(t) + h * width;
      std::fill_n(mean, width, 0.0f);
      for (int64_t s = 0; s < segments; ++s) {
        float* state = part(t, h, s);
        const float factor = std::exp(state[0] - top);
        if (!(state[1] > 0 || std::isnan(state[1]))) continue;
        sum += state[1] * factor;
        kernels_.scale(factor, width, state + 2);
        kernels_.add(state + 2, width, mean);
      }
      kernels_.scale(1.0f / sum, width, mean);
    }
  }
}

/// Prompts: a unit is a block of queries of one key/value head's group.
void Attention::many_rows(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window,
                          Mat out) {
  const KvShape& shape = cache.shape();
  const int64_t blocks = (q.rows + kQueries - 1) / kQueries, units = blocks * shape.kv_heads;
  std::atomic<int64_t> next{0};
  pool_.run([&](int thread) {
    for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1)) {
      // The last block sees the most keys: begin with it, so that the threads end together.
      const int64_t first = (blocks - 1 - i / shape.kv_heads) * kQueries;
      const int64_t rows = std::min(kQueries, q.rows - first);
      query_block(q.slice(first, rows), cache, layer, pos + first, window, i % shape.kv_heads,
                  out.slice(first, rows), scratch_[static_cast<size_t>(thread)]);
    }
  });
}

/// Positions [0, n) of a head as float32: where they are, or in `room`.
const float* Attention::widen(StoredHead head, const KvShape& shape, int64_t n, float* room) const {
  if (shape.dtype == DType::f32) return static_cast<const float*>(head.data);
  shape.dtype == DType::int8 ? kernels_.widen_heads(head, n, shape.head_dim, room)
                             : kernels_.widen(head.data, shape.dtype, n * shape.head_dim, room);
  return room;
}

void Attention::query_block(Mat q, const CpuKvCache& cache, int64_t layer, int64_t pos, int64_t window,
                            int64_t g, Mat out, std::vector<float>& scratch) const {
  const KvShape& shape = cache.shape();
  const int64_t width = shape.head_dim, group = q.cols / width / shape.kv_heads;
  scratch.resize(std::max(scratch.size(),
                          static_cast<size_t>(kQueries * (kChunk + 64 + 2 * group) + 2 * kChunk * width)));
  float* score = scratch.data();                // (kQueries, kChunk)
  float* max = score + kQueries * kChunk + 64;  // (group, kQueries)
  float* sum = max + group * kQueries;          // (group, kQueries)
  float* wide = sum + group * kQueries;         // keys, then values of one chunk as float32
  std::fill_n(max, group * kQueries, kLowest);
  std::fill_n(sum, group * kQueries, 0.0f);
  const int64_t at = g * group * width;
  for (int64_t t = 0; t < q.rows; ++t) std::fill_n(out.row(t) + at, group * width, 0.0f);

  const int64_t last = pos + q.rows;
  for (int64_t j = first_key(pos, window) / kChunk * kChunk; j < last; j += kChunk) {
    const int64_t n = std::min(kChunk, last - j);
    const float* keys = widen(cache.keys(layer, j / kChunk, g), shape, n, wide);
    const float* values = widen(cache.values(layer, j / kChunk, g), shape, n, wide + kChunk * width);
    for (int64_t h = 0; h < group; ++h) {
      const int64_t head = at + h * width;
      sgemm(true, q.rows, n, width, 1.0f / std::sqrt(static_cast<float>(width)), q.data + head, q.stride,
            keys, width, 0.0f, score, kChunk);
      for (int64_t t = 0; t < q.rows; ++t) {
        const int64_t begin = std::clamp<int64_t>(first_key(pos + t, window) - j, 0, n);
        const int64_t end = std::clamp<int64_t>(pos + t + 1 - j, begin, n);
        float* state = max + h * kQueries + t;
        const float factor =
            kernels_.soften(score + t * kChunk, n, begin, end, state, sum + h * kQueries + t);
        if (factor != 1.0f) kernels_.scale(factor, width, out.row(t) + head);
      }
      sgemm(false, q.rows, width, n, 1.0f, score, kChunk, values, width, 1.0f, out.data + head, out.stride);
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t t = 0; t < q.rows; ++t) {
      kernels_.scale(1.0f / sum[h * kQueries + t], width, out.row(t) + at + h * width);
    }
  }
}

}  // namespace larosa
