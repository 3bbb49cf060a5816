// The largest entries of a row, in order: what the next token is drawn from. Every block sorts those of its
// stretch, and one more launch those of all stretches in the same way.
#include <cfloat>

#include "backend/cuda/launch.h"
#include "backend/cuda/select.cuh"

namespace larosa::cuda {
namespace {

/// Up to here one block takes the whole row; beyond, every stretch is longer than what is taken of it.
constexpr int kOneStretch = 2 * kStretches * kMostLargest;
static_assert(kOneStretch <= kMostHeld && kStretches * kMostLargest <= kMostHeld);
static_assert(kMostLargest <= kRowThreads);

/// Integers in the order of what entries count as: Candidate::finite. Zeros of either sign are equal.
__device__ inline int order_of(float x) {
  const float finite = isnan(x) ? -FLT_MAX : min(max(x, -FLT_MAX), FLT_MAX);
  const int bits = __float_as_int(__fadd_rn(finite, 0.0f));  // −0 becomes +0
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
constexpr int kLeast = static_cast<int>(0x80800000);  // of −FLT_MAX

/// Those of a stretch that a block has found, in any order.
struct Found {
  int count, entry[kMostLargest];
  uint64_t sorts_by[kMostLargest];
};

/// find_cut wants keys of 31 bits, 0 for what is beyond the row, and tells those apart that lie around the
/// cut. So keys tell apart the entries of the sign that the cut has, `positive` or not: the other ones are
/// all below it or all above.
__device__ inline int key_of(int order, bool positive) {
  if (positive) return max(order + 1, 0);
  return order >= 0 ? kNanKey : order - kLeast + 1;
}

/// Fills `found`. Bins are clear, and `found` empty, after the next barrier.
template <int kVectors>
__device__ void find(const float* x, int cols, int count, Found& found) {
  HeldKeys<kVectors> keys{own_places<kVectors>(), {}};
  // Entries are not kept beside their keys: of ten vectors both have too many registers.
  Vectors<kVectors> row{keys.at, {}};
  row.load(x, cols);
  int positive = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys.key[v][i] = order_of(row.x[v][i]);
      positive += keys.at.entry(v, i) < cols && keys.key[v][i] >= 0;
    }
  }
  positive = block_reduce<kRowThreads>(positive, select_scratch().of_warp, Add());
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      keys.key[v][i] = keys.at.entry(v, i) < cols ? key_of(keys.key[v][i], positive >= count) : 0;
  }
  const Cut cut = count < cols ? find_cut(keys, cols, 0, count, 0) : keep_all();
  keys.each([&](int e, int key) {
    if (e < cols && cut.keeps(e, key)) found.entry[atomicAdd(&found.count, 1)] = e;
  });
}

/// Where a block's stretch begins: whole vectors of four lie in one.
__device__ inline int stretch_begin(int cols, unsigned block) {
  if (block == gridDim.x) return cols;
  return static_cast<int>(static_cast<int64_t>(cols) * block / gridDim.x) / 4 * 4;
}

/// `count` of every stretch, one stretch behind the other. Entries without ids are a row's.
__global__ void __launch_bounds__(kRowThreads) largest_kernel(Entries from, int cols, int count, Entries to) {
  Found& found = block_object<Found>();
  const int first = stretch_begin(cols, blockIdx.x), own = stretch_begin(cols, blockIdx.x + 1) - first;
  clear_bins(0);
  if (threadIdx.x == 0) found.count = 0;
  wait_for_inputs();
  with_vectors(own, [&](auto n) { find<n.value>(from.value + first, own, count, found); });
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_one = thread < count;
  const int e = first + (has_one ? found.entry[thread] : 0);
  const float x = __ldcg(from.value + e);
  // The larger one first, then the lower index.
  const uint64_t sorts_by =
      uint64_t{static_cast<uint32_t>(order_of(x)) ^ 0x80000000u} << 32 | ~static_cast<uint32_t>(e);
  if (has_one) found.sorts_by[thread] = sorts_by;
  __syncthreads();
  if (!has_one) return;
  int place = static_cast<int>(blockIdx.x) * count;
#pragma unroll 8
  for (int i = 0; i < count; ++i) place += found.sorts_by[i] > sorts_by;
  to.value[place] = x;
  to.id[place] = from.id ? __ldcg(from.id + e) : e;
}

}  // namespace

bool finds_largest(int64_t cols, int64_t count) {
  return count <= kMostLargest && cols <= int64_t{kStretches} * (kMostHeld - 4);
}

void largest(const Stream& s, Mat x, int count, const Entries& stretches, const Entries& to) {
  const auto launch = [&](int blocks, const Entries& from, int cols, const Entries& found) {
    launch_kernel(s, largest_kernel, static_cast<unsigned>(blocks), kRowThreads, kBinBytes, from, cols, count,
                  found);
  };
  const Entries row{x.data, nullptr};
  const int cols = static_cast<int>(x.cols);
  if (cols <= kOneStretch) return launch(1, row, cols, to);
  launch(kStretches, row, cols, stretches);
  launch(1, stretches, kStretches * count, to);
}

}  // namespace larosa::cuda
