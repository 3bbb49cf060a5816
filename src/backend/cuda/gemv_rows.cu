// The decoding product for weights in rows layout (the head, dense models as they came): dot products, two
// rows of the weight per warp, so that the input is read from shared memory once for both.
#include <algorithm>

#include "backend/cuda/gemv_types.cuh"
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"
#include "base/error.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = kRowThreads, kWarps = kRowWarps;
constexpr int kRows = 2;
constexpr int kAhead = 4;  // vectors in flight per row

struct Args {
  const char* weight;
  const float* bias;
  float* y;
  Input in;
  int out;
  bool accumulate, aligned;
  // Listed: which outputs are wanted, and of these those whose `chosen` is not zero.
  const int32_t *count, *index;
  const float* chosen;
};

template <class T>
__device__ float dot_vector(const uint4& v, const float* x) {
  float sum = 0;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
  for (int i = 0; i < Plain<T>::kLane; ++i) sum = fmaf(x[i], widen(elements[i]), sum);
  return sum;
}

/// The row, or its norm, to shared memory; every block writes a run of a norm down where the input wants
/// that.
__device__ void store_row(const Input& in, float* to) {
  if (in.source != Source::norm) {
    // Copies that pass no register are all in flight at once.
    if (reinterpret_cast<uintptr_t>(in.x) % 16 == 0 && in.cols % 4 == 0) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) * 4; i < in.cols; i += kThreads * 4)
        fetch_vector(in.x + i, to + i);
    } else {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < in.cols; i += kThreads) fetch_word(in.x + i, to + i);
    }
    wait_for_fetched();
    return __syncthreads();
  }
  with_vectors(in.cols, [&](auto n) {
    Vectors<n.value> row{own_places<n.value>(), {}};
    row.load(in.x, in.cols);
    row.clear_beyond(in.cols);
    const float factor = norm_factor(row.square_sum(select_scratch().reduced), in.cols, in.eps);
#pragma unroll
    for (int v = 0; v < n.value; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = row.at.entry(v, i);
        if (e < in.cols) to[e] = norm_entry(row.x[v][i], factor, in.gain, e);
      }
    }
  });
  __syncthreads();
  if (!in.values) return;
  const int begin = static_cast<int>(blockIdx.x) * in.left, end = min(begin + in.left, in.cols);
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kThreads) in.values[e] = to[e];
}

/// kListed: only the outputs of a list, in its order; those whose value is zero stay as they are.
template <class T, bool kListed>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) float row[];
  wait_for_inputs();
  store_row(a.in, row);
  constexpr int kVector = Plain<T>::kLane;
  const int64_t line = static_cast<int64_t>(a.in.cols) * static_cast<int64_t>(sizeof(T));
  const int vectors = a.aligned ? a.in.cols / kVector : 0;
  const int stride = static_cast<int>(gridDim.x) * kWarps * kRows;
  const int count = kListed ? __ldcg(a.count) : a.out;
  for (int first = (static_cast<int>(blockIdx.x) * kWarps + warp()) * kRows; first < count; first += stride) {
    float sum[kRows] = {};
    int64_t output[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      output[r] = kListed && first + r < count ? __ldcg(a.index + first + r) : first + r;
    for (int v = lane(); v < vectors; v += kAhead * kWarp) {
      uint4 loaded[kAhead][kRows];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          loaded[u][r] = {};
          if (v + u * kWarp < vectors && first + r < count)
            loaded[u][r] = load_stream(a.weight + output[r] * line + (v + u * kWarp) * 16);
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (v + u * kWarp >= vectors) continue;
        float x[kVector];
        const float4* from = reinterpret_cast<const float4*>(row + (v + u * kWarp) * kVector);
#pragma unroll
        for (int i = 0; i < kVector / 4; ++i) {
          const float4 four = from[i];
          x[4 * i] = four.x;
          x[4 * i + 1] = four.y;
          x[4 * i + 2] = four.z;
          x[4 * i + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] += dot_vector<T>(loaded[u][r], x);
      }
    }
    for (int r = 0; r < kRows && first + r < count; ++r) {
      const T* elements = reinterpret_cast<const T*>(a.weight + output[r] * line);
      for (int i = vectors * kVector + lane(); i < a.in.cols; i += kWarp)
        sum[r] = fmaf(row[i], widen(elements[i]), sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = warp_reduce(sum[r], Add());
      if (lane() != 0 || first + r >= count) continue;
      if (kListed && __ldcg(a.chosen + output[r]) == 0) continue;
      if (a.bias) total = __fadd_rn(total, a.bias[output[r]]);
      if (a.accumulate) total = __fadd_rn(total, a.y[output[r]]);
      a.y[output[r]] = total;
    }
  }
}

template <bool kListed>
void launch(const Stream& s, const Input& in, const Product& product, const int32_t* listed,
            const float* chosen) {
  const Weight& w = product.weight;
  CHECK(in.select == Selects::all && (in.source == Source::row || in.cols <= kMostHeld));
  const int64_t shared = in.cols * static_cast<int64_t>(sizeof(float));
  if (shared > s.shared_bytes) fail("cuda: a row of ", in.cols, " entries does not fit in shared memory");
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.in * dtype_size(w.dtype) % 16 == 0;
  Args a{static_cast<const char*>(w.data),
         w.bias,
         product.y.data,
         in,
         static_cast<int>(w.out),
         product.accumulate,
         aligned,
         listed,
         listed ? listed + 1 : nullptr,
         chosen};
  const int blocks = std::clamp((a.out + kRows * kWarps - 1) / (kRows * kWarps), 1, s.multiprocessors);
  a.in.left = (in.cols + blocks - 1) / blocks;
  if (w.dtype == DType::f32)
    return launch_kernel(s, rows_kernel<float, kListed>, blocks, kThreads, shared, a);
  if (w.dtype == DType::f16)
    return launch_kernel(s, rows_kernel<__half, kListed>, blocks, kThreads, shared, a);
  CHECK(w.dtype == DType::bf16);
  launch_kernel(s, rows_kernel<__nv_bfloat16, kListed>, blocks, kThreads, shared, a);
}

}  // namespace

void gemv_rows(const Stream& s, const Input& in, const Product& product) {
  launch<false>(s, in, product, nullptr, nullptr);
}

void gemv_outputs(const Stream& s, const Input& in, const Product& product, const float* chosen,
                  int32_t* scratch) {
  list_entries(s, chosen, product.y.cols, scratch, scratch + 1);
  const size_t bytes = static_cast<size_t>(product.y.cols) * sizeof(float);
  check(cudaMemsetAsync(product.y.data, 0, bytes, s.stream), "memory");
  launch<true>(s, in, product, scratch, chosen);
}

}  // namespace larosa::cuda
