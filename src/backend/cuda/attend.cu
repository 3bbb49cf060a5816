// Attention of several rows over the cache, which they are appended to first: blocks of queries walk over
// tiles of keys.
#include <cmath>

#include "backend/cuda/cache.cuh"
#include "backend/cuda/launch.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(Mat k, Mat v, CacheLayer cache, int64_t pos) {
  wait_for_inputs();
  const int64_t t = blockIdx.x, width = cache.head_dim;
  T* const keys = static_cast<T*>(cache.keys);
  T* const values = static_cast<T*>(cache.values);
  if constexpr (kLevels<T>) {
    for (int64_t head = warp(); head < cache.kv_heads; head += kWarps) {
      const int64_t place = place_of(cache, head, pos + t);
      const float* const key = k.data + t * k.stride + head * width;
      const float* const value = v.data + t * v.stride + head * width;
      store_levels([&](int e) { return key[e]; }, static_cast<int>(width), keys + place * width,
                   cache.key_scales + place);
      store_levels([&](int e) { return value[e]; }, static_cast<int>(width), values + place * width,
                   cache.value_scales + place);
    }
  } else {
    for (int64_t i = threadIdx.x; i < k.cols; i += kThreads) {
      const int64_t to = place_of(cache, i / width, pos + t) * width + i % width;
      narrow(k.data[t * k.stride + i], keys[to]);
      narrow(v.data[t * v.stride + i], values[to]);
    }
  }
}

constexpr int kQueries = 16, kKeys = 32, kRowsPerWarp = kQueries / kWarps;

/// Queries [16·blockIdx.x, …) of head blockIdx.y. A warp has four of them; lanes are keys, then entries.
template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Mat q, CacheLayer cache, int64_t pos, int64_t window, int group, float scale, Mat out) {
  extern __shared__ __align__(16) float shared[];
  wait_for_inputs();
  const int width = static_cast<int>(cache.head_dim), head = static_cast<int>(blockIdx.y),
            kv_head = head / group;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int64_t rows = min(static_cast<int64_t>(kQueries), q.rows - first_row);
  float* const queries = shared;                     // (kQueries, width)
  float* const keys = queries + kQueries * width;    // (kKeys, width + 1): no two lanes in a bank
  float* const values = keys + kKeys * (width + 1);  // (kKeys, width)
  float* const weight = values + kKeys * width;      // (kQueries, kKeys)
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * width; i += kThreads) {
    const int64_t t = i / width;
    queries[i] = t < rows ? q.data[(first_row + t) * q.stride + head * width + i % width] * scale : 0;
  }
  const auto first_position = [&](int64_t position) {
    return window > 0 ? max(static_cast<int64_t>(0), position - window + 1) : 0;
  };
  float most[kRowsPerWarp], total[kRowsPerWarp] = {}, sum[kRowsPerWarp][kPieces] = {};
#pragma unroll
  for (float& m : most) m = -INFINITY;
  const int64_t stop = pos + first_row + rows;
  for (int64_t begin = first_position(pos + first_row); begin < stop; begin += kKeys) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kKeys * width; i += kThreads) {
      const int j = i / width, e = i % width;
      const int64_t place = place_of(cache, kv_head, min(begin + j, stop - 1));
      keys[j * (width + 1) + e] = stored<T>(cache.keys, cache.key_scales, place, width, e);
      values[i] = stored<T>(cache.values, cache.value_scales, place, width, e);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int row = warp() * kRowsPerWarp + r;
      const int64_t position = pos + first_row + row, key = begin + lane();
      float score = 0;
      for (int e = 0; e < width; ++e)
        score = fmaf(queries[row * width + e], keys[lane() * (width + 1) + e], score);
      if (row >= rows || key > position || key < first_position(position)) score = -INFINITY;
      const float now = Larger()(most[r], warp_reduce(score, Larger()));
      const bool none = now == -INFINITY;
      const float share = none ? 0 : expf(score - now), fade = none ? 1 : expf(most[r] - now);
      total[r] = fmaf(total[r], fade, warp_reduce(share, Add()));
      most[r] = now;
      weight[row * kKeys + lane()] = share;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) sum[r][p] *= fade;
    }
    __syncwarp();
    for (int j = 0; j < kKeys; ++j) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int e = lane() + p * kWarp;
        const float v = e < width ? values[j * width + e] : 0;
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r)
          sum[r][p] = fmaf(weight[(warp() * kRowsPerWarp + r) * kKeys + j], v, sum[r][p]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = warp() * kRowsPerWarp + r;
    if (row >= rows) continue;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int e = lane() + p * kWarp;
      if (e < width)
        out.data[(first_row + row) * out.stride + head * width + e] = __fdiv_rn(sum[r][p], total[r]);
    }
  }
}

template <class T>
void several_rows(const Stream& s, Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window,
                  Mat out) {
  launch_kernel(s, append_kernel<T>, static_cast<unsigned>(k.rows), kThreads, 0, k, v, cache, pos);
  const int64_t width = cache.head_dim;
  const dim3 blocks(static_cast<unsigned>((q.rows + kQueries - 1) / kQueries),
                    static_cast<unsigned>(q.cols / width));
  const int64_t floats = (kQueries + 2 * kKeys) * width + kKeys + kQueries * kKeys;
  auto* const kernel = width <= 32    ? rows_kernel<T, 1>
                       : width <= 64  ? rows_kernel<T, 2>
                       : width <= 128 ? rows_kernel<T, 4>
                                      : rows_kernel<T, 8>;
  const int group = static_cast<int>(q.cols / k.cols);
  launch_kernel(s, kernel, blocks, kThreads, floats * 4, q, cache, pos, window, group, score_scale(width),
                out);
}

}  // namespace

void attend(const Stream& s, Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window,
            Mat out) {
  if (cache.dtype == DType::f32) return several_rows<float>(s, q, k, v, cache, pos, window, out);
  if (cache.dtype == DType::f16) return several_rows<__half>(s, q, k, v, cache, pos, window, out);
  several_rows<int8_t>(s, q, k, v, cache, pos, window, out);
}

}  // namespace larosa::cuda
