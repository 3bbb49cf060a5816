// Stands in for src/backend/cuda/machine.cuh and for what nvcc knows by itself, so that kernels run on the
// host without a device: threads are contexts that take turns, warps in an order that changes, some far ahead
// of others. A barrier that is missing shows as a wrong result sooner than on a device, whose warps go side
// by side; an access that is not aligned, shared memory overrun and blocks that wait for each other forever
// end the process. Loads and stores happen in the order of the source, so fences are not tested.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Everything that spells an attribute as CUDA spells a word comes before these are defined.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#undef __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace larosa::emulation {

constexpr int kWarp = 32;

/// Where the thread that runs now is.
const uint3& thread_index();
const uint3& block_index();
const dim3& grid_size();

/// Ends the process.
[[noreturn]] void give_up(const char* why);
/// Lets others run, which the thread waits for.
void yield();
/// Until every thread of the block has come here.
void barrier();
/// Until every lane of the warp has come here: what each of them brought.
const uint64_t* exchange(uint64_t mine);

char* block_memory();
/// `bytes` of the block's own shared memory, for `key`; what is in them at first is nobody's.
void* block_object(const void* key, size_t bytes);

/// A barrier of the blocks of a cluster, in two halves.
void arrive_at_cluster();
void wait_for_cluster();
/// What the cluster's block `rank` has for p, which is in this one's shared memory.
void* in_block(const void* p, int rank);

/// Every block of a grid, side by side, clusters of so many with neighbours.
void run(dim3 blocks, unsigned cluster, int threads, int64_t shared, const std::function<void()>& kernel);

template <class T>
uint64_t bits_of(T v) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(v));
  return bits;
}
template <class T>
T value_of(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
/// op over what the lanes of a warp bring.
template <class T, class Op>
T over_warp(T mine, const Op& op) {
  const uint64_t* const all = exchange(bits_of(mine));
  T v = value_of<T>(all[0]);
  for (int i = 1; i < kWarp; ++i) v = op(v, value_of<T>(all[i]));
  return v;
}
template <class T>
T of_lane(T mine, int lane) {
  return value_of<T>(exchange(bits_of(mine))[lane & (kWarp - 1)]);
}
inline int lane() {
  return static_cast<int>(thread_index().x) % kWarp;
}

}  // namespace larosa::emulation

#define threadIdx (::larosa::emulation::thread_index())
#define blockIdx (::larosa::emulation::block_index())
#define gridDim (::larosa::emulation::grid_size())

using std::isnan;
using std::max;
using std::min;

inline void __syncthreads() {
  larosa::emulation::barrier();
}
inline int __syncthreads_and(bool p) {
  // Two objects in turn would do; three barriers are simpler.
  static const char key = 0;
  int& all = *static_cast<int*>(larosa::emulation::block_object(&key, sizeof(int)));
  larosa::emulation::barrier();
  all = 1;
  larosa::emulation::barrier();
  if (!p) all = 0;
  larosa::emulation::barrier();
  return all;
}
inline void __syncwarp() {
  larosa::emulation::exchange(0);
}
template <class T>
T __reduce_add_sync(unsigned, T v) {
  return larosa::emulation::over_warp(v, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned, T v) {
  return larosa::emulation::over_warp(v, [](T a, T b) { return min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned, T v) {
  return larosa::emulation::over_warp(v, [](T a, T b) { return max(a, b); });
}
inline uint32_t __ballot_sync(unsigned, bool p) {
  const uint32_t mine = static_cast<uint32_t>(p) << larosa::emulation::lane();
  return larosa::emulation::over_warp(mine, [](uint32_t a, uint32_t b) { return a | b; });
}
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return larosa::emulation::of_lane(v, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return larosa::emulation::of_lane(v, larosa::emulation::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int step) {
  const int lane = larosa::emulation::lane();
  return larosa::emulation::of_lane(v, lane >= step ? lane - step : lane);
}
template <class T>
T atomicAdd(T* p, T v) {
  const T before = *p;
  *p = before + v;
  return before;
}
template <class T>
T __ldcg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0)
    larosa::emulation::give_up("an access is not aligned");
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
inline int __popc(uint32_t v) {
  return std::popcount(v);
}
inline int __ffs(int v) {
  return v == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(v)) + 1;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
inline int __float_as_int(float v) {
  return std::bit_cast<int>(v);
}
inline float __int_as_float(int v) {
  return std::bit_cast<float>(v);
}
inline uint32_t __float_as_uint(float v) {
  return std::bit_cast<uint32_t>(v);
}
inline float __uint_as_float(uint32_t v) {
  return std::bit_cast<float>(v);
}
inline int __float2int_rn(float v) {
  return static_cast<int>(std::nearbyint(v));
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}

namespace larosa::cuda {

inline char* block_memory() {
  return emulation::block_memory();
}
template <class T>
T& block_object() {
  static const char key = 0;
  return *static_cast<T*>(emulation::block_object(&key, sizeof(T)));
}

inline int thread_anew() {
  return static_cast<int>(threadIdx.x);
}

class SharedCounters {
 public:
  explicit SharedCounters(int* first) : first_(first) {}
  void add_one(int i) const { ++first_[i]; }

 private:
  int* first_;
};

inline int magnitude(float x, float by) {
  const float product = std::fabs(x * by);
  return isnan(product) ? 0x7fffffff : std::bit_cast<int>(product);
}

/// p, which must be aligned to `bytes`.
inline const void* aligned_to(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) emulation::give_up("an access is not aligned");
  return p;
}
inline uint4 load_stream(const void* p) {
  return *static_cast<const uint4*>(aligned_to(p, 16));
}
template <class T>
void load_once(const void* p, T& v) {
  v = *static_cast<const T*>(aligned_to(p, sizeof(T)));
}
inline void fetch_vector(const void* x, void* to) {
  aligned_to(to, 16);
  std::memcpy(to, aligned_to(x, 16), 16);
}
inline void fetch_word(const void* x, void* to) {
  aligned_to(to, 4);
  std::memcpy(to, aligned_to(x, 4), 4);
}
inline void wait_for_fetched() {}
inline void fetch_to_cache(const void*) {}
inline uint32_t observe(const uint32_t* counter) {
  emulation::yield();
  return *counter;
}
inline uint32_t glance(const uint32_t* counter) {
  return observe(counter);
}
inline void send(uint64_t* to, float value, uint32_t stamp) {
  *to = uint64_t{stamp} << 32 | __float_as_uint(value);
}
inline bool receive(const uint64_t* from, uint32_t stamp, float& value) {
  emulation::yield();
  value = __uint_as_float(static_cast<uint32_t>(*from));
  return *from >> 32 == stamp;
}
inline void arrive_at_cluster() {
  emulation::arrive_at_cluster();
}
inline void wait_for_cluster() {
  emulation::wait_for_cluster();
}
template <class T>
T* in_block(T* p, int rank) {
  return static_cast<T*>(emulation::in_block(p, rank));
}
inline void count(uint32_t* counter) {
  ++*counter;
}

}  // namespace larosa::cuda
