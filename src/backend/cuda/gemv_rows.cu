// The decoding product for weights in rows layout (the head, dense models as they came): dot products,
// several rows of the weight per warp, so that the input is read from shared memory once for all.
#include <algorithm>

#include "backend/cuda/gemv_types.cuh"
#include "backend/cuda/launch.h"
#include "backend/cuda/row.cuh"
#include "base/error.h"
#include "base/quant.h"

namespace larosa::cuda {
namespace {

constexpr int kThreads = kRowThreads, kWarps = kRowWarps;
/// Rows of a warp, of quantised ones four. Llama-2-7B's head at 8 bits takes 6 us less so than by two.
template <class Type>
constexpr int kRowsOf = Type::kLane > 8 ? 4 : 2;

struct Args {
  const char* weight;
  const float* bias;
  float* y;
  Input in;
  int64_t line;  // bytes of a row
  int out;
  int vectors;  // of 16 bytes, that hold a row's entries, but for some at the end of a plain one
  int padded;   // entries that a row has room for
  bool accumulate;
  // Listed: which outputs are wanted, and of these those whose `chosen` is not zero.
  const int32_t *count, *index;
  const float* chosen;
};

// Where entry e of the input stands in shared memory. For quantised weights fours change places, within 16
// entries (int4: 32), so that those which eight lanes want at once are in different banks: Llama-2-7B's head
// takes 38 us less. For bf16, where two lanes meet, it gained nothing.

template <class T>
__device__ int place_of(Plain<T>, int e) {
  return e;
}
__device__ int place_of(Bytes, int e) {
  return e ^ (e / 32 % 4 * 4);
}
__device__ int place_of(Nibbles, int e) {
  return e ^ (e / 128 % 2 * 16);
}

template <class Type>
__device__ void take_four(Type type, const float* row, int e, float& a, float& b, float& c, float& d) {
  const float4 four = *reinterpret_cast<const float4*>(row + place_of(type, e));
  a = four.x, b = four.y, c = four.z, d = four.w;
}

// A type's vector v of a row: the entries of the input that it meets, in its own order, and the product.

template <class Type>
__device__ void take_entries(Type type, const float* row, int v, float (&x)[Type::kLane]) {
#pragma unroll
  for (int i = 0; i < Type::kLane; i += 4)
    take_four(type, row, v * Type::kLane + i, x[i], x[i + 1], x[i + 2], x[i + 3]);
}
__device__ void take_entries(Nibbles type, const float* row, int v, float (&x)[Nibbles::kLane]) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
    take_four(type, row, v / 4 * 128 + v % 4 * 4 + 16 * k, x[k], x[8 + k], x[16 + k], x[24 + k]);
}

template <class T>
__device__ float dot_vector(Plain<T>, const uint4& v, const float (&x)[Plain<T>::kLane]) {
  float sum = 0;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
  for (int i = 0; i < Plain<T>::kLane; ++i) sum = fmaf(x[i], widen(elements[i]), sum);
  return sum;
}
__device__ float dot_vector(Bytes, const Bytes::Loaded& v, const float (&x)[Bytes::kLane]) {
  float sum = 0;
  const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int b = 0; b < 4; ++b) sum = fmaf(x[4 * w + b], Bytes::level(words[w], b), sum);
  }
  return __fmul_rn(sum, Bytes::scale(v));
}
__device__ float dot_vector(Nibbles, const Nibbles::Loaded& v, const float (&x)[Nibbles::kLane]) {
  float sum[4] = {};
  const uint32_t words[4] = {v.q.x, v.q.y, v.q.z, v.q.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      sum[k / 2] = fmaf(x[8 * w + k], Nibbles::raised(words[w], k) - Nibbles::kRaised, sum[k / 2]);
  }
  const Nibbles::Scales scale = Nibbles::scales(v);
  float total = __fmul_rn(sum[0], scale.of[0]);
#pragma unroll
  for (int g = 1; g < 4; ++g) total = fmaf(sum[g], scale.of[g], total);
  return total;
}

/// A vector of a line that a warp reads from end to end, with more of it to the second-level cache: its
/// scales are those of vectors that come next, so they stay in the first.
__device__ void load_whole(const char* at, int, uint4& v) {
  v = load_stream(at);
}
template <class Loaded>
__device__ void load_whole(const char* at, int extra, Loaded& v) {
  v.q = load_stream(at);
  v.scale = __ldg(reinterpret_cast<const decltype(v.scale)*>(at + extra));
}

/// Scales of groups behind the last value, whatever a file has there, count for nothing. groups: from the
/// vector's block of 128 on.
template <class Loaded>
__device__ void drop_scales(Loaded&, int) {}
__device__ void drop_scales(Nibbles::Loaded& v, int groups) {
  if (groups >= 4) return;
  if (groups < 2) v.scale.x &= 0xffffu;
  v.scale.y = groups < 3 ? 0 : v.scale.y & 0xffffu;
}

/// What the vectors leave of a plain row; quantised ones are padded to whole vectors.
template <class T>
__device__ float add_rest(Plain<T>, const char* line, int first, const float* row, int cols, float sum) {
  for (int i = first + lane(); i < cols; i += kWarp)
    sum = fmaf(row[i], widen(reinterpret_cast<const T*>(line)[i]), sum);
  return sum;
}
template <class Type>
__device__ float add_rest(Type, const char*, int, const float*, int, float sum) {
  return sum;
}

/// The row, or its norm, to shared memory, each entry to its place; every block writes a run of a norm down
/// where the input wants that.
template <class Type>
__device__ void store_row(Type type, const Input& in, float* to) {
  if (in.source != Source::norm) {
    // Copies that pass no register are all in flight at once.
    if (reinterpret_cast<uintptr_t>(in.x) % 16 == 0 && in.cols % 4 == 0) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) * 4; i < in.cols; i += kThreads * 4)
        fetch_vector(in.x + i, to + place_of(type, i));
    } else {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < in.cols; i += kThreads)
        fetch_word(in.x + i, to + place_of(type, i));
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
        if (e < in.cols) to[place_of(type, e)] = norm_entry(row.x[v][i], factor, in.gain, e);
      }
    }
  });
  __syncthreads();
  if (!in.values) return;
  const int begin = static_cast<int>(blockIdx.x) * in.left, end = min(begin + in.left, in.cols);
  for (int e = begin + static_cast<int>(threadIdx.x); e < end; e += kThreads)
    in.values[e] = to[place_of(type, e)];
}

/// kListed: only the outputs of a list, in its order; those whose value is zero stay as they are.
template <class Type, bool kListed>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Args a) {
  constexpr int kRows = kRowsOf<Type>, kAhead = 8 / kRows;  // rows, vectors of each in flight
  auto* const row = reinterpret_cast<float*>(block_memory());
  wait_for_inputs();
  for (int i = a.in.cols + static_cast<int>(threadIdx.x); i < a.padded; i += kThreads)
    row[place_of(Type(), i)] = 0;
  store_row(Type(), a.in, row);
  const int stride = static_cast<int>(gridDim.x) * kWarps * kRows;
  const int count = kListed ? __ldcg(a.count) : a.out;
  for (int first = (static_cast<int>(blockIdx.x) * kWarps + warp()) * kRows; first < count; first += stride) {
    float sum[kRows] = {};
    int64_t output[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      output[r] = kListed && first + r < count ? __ldcg(a.index + first + r) : first + r;
    for (int v = lane(); v < a.vectors; v += kAhead * kWarp) {
      typename Type::Loaded loaded[kAhead][kRows];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int at = v + u * kWarp;
          loaded[u][r] = {};
          if (at < a.vectors && first + r < count)
            load_whole(a.weight + output[r] * a.line + at * 16, Type::extra(at, a.padded), loaded[u][r]);
          drop_scales(loaded[u][r], (a.in.cols + 31) / 32 - at / 4 * 4);
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (v + u * kWarp >= a.vectors) continue;
        float x[Type::kLane];
        take_entries(Type(), row, v + u * kWarp, x);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] += dot_vector(Type(), loaded[u][r], x);
      }
    }
    for (int r = 0; r < kRows && first + r < count; ++r)
      sum[r] =
          add_rest(Type(), a.weight + output[r] * a.line, a.vectors * Type::kLane, row, a.in.cols, sum[r]);
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

template <class Type, bool kListed>
void launch_as(const Stream& s, const Input& in, const Product& product, const int32_t* listed,
               const float* chosen) {
  const Weight& w = product.weight;
  CHECK(in.select == Selects::all && (in.source == Source::row || in.cols <= kMostHeld));
  const int64_t padded = quantised(w.dtype) ? padded_line(w.in) : w.in;
  const int64_t shared = padded * static_cast<int64_t>(sizeof(float));
  if (shared > s.shared_bytes) fail("cuda: a row of ", in.cols, " entries does not fit in shared memory");
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.line_bytes() % 16 == 0;
  CHECK(aligned || !quantised(w.dtype));
  Args a{static_cast<const char*>(w.data),
         w.bias,
         product.y.data,
         in,
         w.line_bytes(),
         static_cast<int>(w.out),
         aligned ? static_cast<int>(padded / Type::kLane) : 0,
         static_cast<int>(padded),
         product.accumulate,
         listed,
         listed ? listed + 1 : nullptr,
         chosen};
  constexpr int kRows = kRowsOf<Type>;
  const int blocks = std::clamp((a.out + kRows * kWarps - 1) / (kRows * kWarps), 1, s.multiprocessors);
  a.in.left = (in.cols + blocks - 1) / blocks;
  launch_kernel(s, rows_kernel<Type, kListed>, blocks, kThreads, shared, a);
}

template <bool kListed>
void launch(const Stream& s, const Input& in, const Product& product, const int32_t* listed,
            const float* chosen) {
  const auto as = [&]<class Type>(Type) { launch_as<Type, kListed>(s, in, product, listed, chosen); };
  switch (product.weight.dtype) {
    case DType::f32:
      return as(Plain<float>());
    case DType::f16:
      return as(Plain<__half>());
    case DType::bf16:
      return as(Plain<__nv_bfloat16>());
    case DType::int8:
      return as(Bytes());
    case DType::int4:
      return as(Nibbles());
    default:
      CHECK(false);
  }
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
