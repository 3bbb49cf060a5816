// What kernels take from the machine that CUDA C++ has no words for: a block's dynamic shared memory by
// offsets, copies into it, loads that leave no trace, counters. tests/emulation has another one, with which
// kernels run on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace larosa::cuda {

/// A block's dynamic shared memory. Code that reads it by offsets from here is compiled to shared loads; a
/// pointer that a function returned is not known to be shared.
__device__ inline char* block_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
/// The block's own T, in shared memory.
template <class T>
__device__ T& block_object() {
  __shared__ T object;
  return object;
}

/// The thread's number. What is worked out from it inside of a loop stays there: the compiler moved the
/// addresses of rows of every length out of gemv's, into more registers than there are.
__device__ inline int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// Counters in shared memory, by an address that is worked out once: the compiler did it anew for every one
/// of them.
class SharedCounters {
 public:
  __device__ explicit SharedCounters(int* first)
      : at_(static_cast<uint32_t>(__cvta_generic_to_shared(first))) {
    asm volatile("" : "+r"(at_));
  }
  /// Adds one to counter i. Under a condition it would be a branch.
  __device__ void add_one(int i) const {
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(at_ + i * 4) : "memory");
  }

 private:
  uint32_t at_;
};

/// The bits of |x · by|; a NaN's are 0x7fffffff, as of every one that arithmetic makes here: one instruction,
/// where a look for NaNs takes three more. Not in words, where a factor of one may be left out.
__device__ inline int magnitude(float x, float by) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(fabsf(x)), "f"(fabsf(by)));
  return __float_as_int(product);
}

/// What is read once is the first to leave the second-level cache, where code and rows stay. In gemv no
/// branch and no predicate around these loads: the compiler would wait for each.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// 16 bytes of a stream, and the rest of their line of 128 to the second-level cache.
__device__ inline uint4 load_stream(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "l"(evict_first()));
  return v;
}
/// Without the rest: 16, 8 or 2 bytes. Quantised channels of 7B's products are cut up into pieces of 62 to
/// 372 bytes, which other blocks read at other times (int8 dense 1390 tokens/s with it, 1407 without; bf16
/// 946 and 938).
__device__ inline void load_once(const void* p, uint4& v) {
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "l"(evict_first()));
}
__device__ inline void load_once(const void* p, uint2& v) {
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0,%1}, [%2], %3;"
      : "=r"(v.x), "=r"(v.y)
      : "l"(p), "l"(evict_first()));
}
__device__ inline void load_once(const void* p, uint16_t& v) {
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.u16 %0, [%1], %2;" : "=h"(v) : "l"(p), "l"(evict_first()));
}

/// Starts a copy of 16 or 4 bytes to shared memory, both aligned to them.
__device__ inline void fetch_vector(const void* x, void* to) {
  const auto there = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there), "l"(x) : "memory");
}
__device__ inline void fetch_word(const void* x, void* to) {
  const auto there = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(there), "l"(x) : "memory");
}
/// Until the thread's copies are there, for the thread.
__device__ inline void wait_for_fetched() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Starts bringing a line to the second-level cache.
__device__ inline void fetch_to_cache(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// What a counter of the device stands at: what was written before it came there is seen behind.
__device__ inline uint32_t observe(const uint32_t* counter) {
  uint32_t seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}
/// The same for who reads what was written before by __ldcg and by messages: these are compiled to loads that
/// pass the first-level cache, and a thread issues them behind this one, so that nothing has to be acquired,
/// which is seen, not promised. `observe` empties that cache, and what registers had no room for comes from
/// further away then.
__device__ inline uint32_t glance(const uint32_t* counter) {
  uint32_t seen;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}
/// A value with a stamp, written and read at once: who finds the stamp has the value, without a fence and a
/// flag, which would be two more ways through the second-level cache.
__device__ inline void send(uint64_t* to, float value, uint32_t stamp) {
  const uint64_t message = uint64_t{stamp} << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(message) : "memory");
}
/// True when the message there has the stamp.
__device__ inline bool receive(const uint64_t* from, uint32_t stamp, float& value) {
  uint64_t message;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(message) : "l"(from) : "memory");
  value = __uint_as_float(static_cast<uint32_t>(message));
  return message >> 32 == stamp;
}

/// A barrier of all threads of a cluster of blocks (compute capability 9.0), in two halves: what was done
/// before arriving, in any of their memories, is seen after the wait.
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// Where the cluster's block `rank` has what this one has at p in its shared memory.
template <class T>
__device__ T* in_block(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(rank));
#endif
  return p;
}

/// Adds one; what was written before is seen by who finds it.
__device__ inline void count(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace larosa::cuda
