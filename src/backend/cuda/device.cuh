// What kernels share: programmatic dependent launch and the counter of launches, reductions in a fixed order,
// widening of stored elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/kernels.h"
#include "backend/cuda/machine.cuh"

namespace larosa::cuda {

inline constexpr int kWarp = 32;

/// Until everything that was launched before has finished; from here on the next kernel may be set up, so
/// that its own start hides behind this kernel's work. Without such launches (before compute capability 9.0):
/// nothing.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Until everything that was launched before has finished, for every thread; by the counter where that is
/// possible, since the end of a grid is seen later (7B's layers at 50 %: 968 tokens/s by grids, 983 by the
/// counter). look(counter): how one thread reads it.
template <class Look>
__device__ void wait_for_inputs(const Link& link, const Look& look) {
#if __CUDA_ARCH__ >= 900
  if (!link.polls) {
    cudaGridDependencySynchronize();
  } else if (threadIdx.x == 0) {
    while (static_cast<int32_t>(look(link.done) - link.wanted) < 0) {
    }
  }
#endif
  __syncthreads();
}
__device__ inline void wait_for_inputs(const Link& link) {
  wait_for_inputs(link, observe);
}
/// The same for a block that reads what launches before have written past the first-level cache, and by
/// messages: it does not empty that cache.
__device__ inline void wait_for_inputs_in_memory(const Link& link) {
  wait_for_inputs(link, glance);
}
/// From here on the next launch may be set up beside this one.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
/// The block has written what it writes.
__device__ inline void signal(const Link& link) {
  __syncthreads();
  if (threadIdx.x == 0) count(link.done);
}

__device__ inline int lane() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warp() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

/// op over all threads of the block, in an order that depends on their number alone; `scratch`: one T per
/// warp, which nobody has read since the last barrier.
template <int kThreads, class T, class Op>
__device__ T block_reduce(T value, T* scratch, Op op) {
  value = warp_reduce(value, op);
  if (lane() == 0) scratch[warp()] = value;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) total = op(total, scratch[w]);
  return total;
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
/// A NaN among the two wins, so that it is seen.
struct Larger {
  __device__ float operator()(float a, float b) const { return a >= b || isnan(a) ? a : b; }
};

__device__ inline float silu(float z) {
  return __fdiv_rn(z, __fadd_rn(1.0f, expf(-z)));
}

/// What a feed-forward makes of its gate (base/types.h).
__device__ inline float activated(float z, const Activation& a) {
  if (a.kind == Activation::silu) return silu(z);
  const float v = z <= (a.kind == Activation::relu ? a.threshold : 0.0f) ? 0.0f : z;
  return a.kind == Activation::relu2 ? __fmul_rn(v, v) : v;
}
/// a(gate) · up. Zeros of a neuron at rest are +0, whatever the sign of up: a product lists everything else.
__device__ inline float gated(float gate, float up, const Activation& a) {
  if (a.kind == Activation::silu) return __fmul_rn(silu(gate), up);
  if (a.kind == Activation::drelu && up <= 0) up = 0;
  return __fadd_rn(__fmul_rn(activated(gate, a), up), 0.0f);
}

/// The pair (a, b) turned by an angle.
__device__ inline float2 rotate_pair(float a, float b, float cosine, float sine) {
  return {fmaf(a, cosine, -__fmul_rn(b, sine)), fmaf(b, cosine, __fmul_rn(a, sine))};
}

__device__ inline float widen(float v) {
  return v;
}
__device__ inline float widen(int8_t v) {
  return v;
}
__device__ inline float widen(__half v) {
  return __half2float(v);
}
__device__ inline float widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
/// Value i of a line, by stored type. `padded`: values that the line has room for (quantised lines,
/// base/quant.h).
template <class T>
struct Elements {
  __device__ static float read(const char* line, int64_t i, int64_t) {
    return widen(reinterpret_cast<const T*>(line)[i]);
  }
};
struct Int8Line {
  __device__ static float read(const char* line, int64_t i, int64_t padded) {
    const float scale = widen(reinterpret_cast<const __half*>(line + padded)[i / 128]);
    return __fmul_rn(scale, static_cast<float>(reinterpret_cast<const int8_t*>(line)[i]));
  }
};
struct Int4Line {
  __device__ static float read(const char* line, int64_t i, int64_t padded) {
    const float scale = widen(reinterpret_cast<const __half*>(line + padded / 2)[i / 32]);
    const uint32_t word = reinterpret_cast<const uint32_t*>(line)[i / 128 * 16 + i % 16];
    return __fmul_rn(scale, static_cast<float>(static_cast<int>(word >> (i % 128 / 16 * 4) & 15) - 8));
  }
};

__device__ inline void narrow(float v, float& to) {
  to = v;
}
__device__ inline void narrow(float v, double& to) {
  to = v;
}
__device__ inline void narrow(float v, __half& to) {
  to = __float2half_rn(v);
}
__device__ inline void narrow(float v, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(v);
}

}  // namespace larosa::cuda
