// The loop over a block's channels: what a thread reads of them, and adds.
#pragma once

#include "backend/cuda/deal.cuh"
#include "backend/cuda/gemv_types.cuh"
#include "backend/cuda/row.cuh"

namespace larosa::cuda {

struct Lines {
  const char* data;
  int64_t line;  // bytes of a channel
  int padded;    // outputs that it has room for
  Format format;
};

/// What a thread reads: the vector of outputs from `column` of the tile on, of every `step`-th of the block's
/// own channels. Threads that are left over do what those before them do.
struct Share {
  int column;
  int first, step;
  int vectors;  // of the tile

  __device__ bool counts() const { return static_cast<int>(threadIdx.x) < step * vectors; }  // not left over
};
__device__ inline Share share_of(const Split& split, int lane) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(threadIdx.x * split.magic >> 20);
  return {(thread - group * split.vectors) * lane, min(group, split.groups - 1), split.groups, split.vectors};
}

/// A thread's vector of channel 0, and the bytes from one channel to the next.
struct Vector {
  const char* data;
  uint32_t line;
  int extra;  // gemv_types.cuh
};

/// Starts reading of the channels e, e + step, … as many as there is room for; beyond the last that again,
/// since a load that may not happen would be waited for.
template <class Type, bool kAll>
__device__ void load_half(const Channels& channels, int e, int step, const Vector& vector,
                          typename Type::Loaded (&loaded)[Type::kHalf]) {
  const auto* const near = channels.list.near();
#pragma unroll
  for (int u = 0; u < Type::kHalf; ++u) {
    const int place = min(e + u * step, channels.count - 1);
    const uint32_t channel = kAll ? static_cast<uint32_t>(place) : near[place];
    loaded[u] = Type::load(vector.data + uint64_t{channel} * vector.line, vector.extra);
  }
  __syncwarp();  // keeps the loads together: without it each is waited for before the next is issued
}
/// kWhole: all of them are there.
template <class Type, bool kWhole>
__device__ void add_half(const Channels& channels, int e, int step,
                         const typename Type::Loaded (&loaded)[Type::kHalf], float (&sum)[Type::kSums]) {
  const auto* const value = channels.list.value();
#pragma unroll
  for (int u = 0; u < Type::kHalf; ++u) {
    if (kWhole || e + u * step < channels.count) Type::add(loaded[u], value[e + u * step], sum);
  }
}
/// A half is on its way while the one before is added. When all were loaded, then all added, the threads of a
/// block did the one and the other together (8 layers of 7B at 50 %, int8: 1649 → 1742 tokens/s, int4 1749 →
/// 1885, bf16 1301 → 1308).
template <class Type, bool kAll>
__device__ void add_channels(const Channels& channels, const Share& share, const Vector& vector,
                             float (&sum)[Type::kSums]) {
  const int step = share.step, half = Type::kHalf * step;
  int e = share.first;
  // Lanes of a warp can belong to several groups, fewer than `step`; they turn the loop together.
  const int before = e - __reduce_min_sync(~0u, e);
  if (e - before >= channels.count) return;
  typename Type::Loaded first[Type::kHalf], second[Type::kHalf];
  load_half<Type, kAll>(channels, e, step, vector, first);
#pragma unroll 1
  for (; e - before + 2 * half < channels.count; e += 2 * half) {
    load_half<Type, kAll>(channels, e + half, step, vector, second);
    add_half<Type, true>(channels, e, step, first, sum);
    load_half<Type, kAll>(channels, e + 2 * half, step, vector, first);
    add_half<Type, true>(channels, e + half, step, second, sum);
  }
  if (e - before + half < channels.count) {
    load_half<Type, kAll>(channels, e + half, step, vector, second);
    add_half<Type, false>(channels, e, step, first, sum);
    add_half<Type, false>(channels, e + half, step, second, sum);
  } else {
    add_half<Type, false>(channels, e, step, first, sum);
  }
}

/// Floats from one thread's sums to the next one's: eight threads that write four floats each are in
/// different banks then.
__host__ __device__ constexpr int sums_pitch(int lane) {
  return lane / 4 % 2 == 0 ? lane + 4 : lane;
}
/// The thread's sums to shared memory, where the row was. A function of its own: inlined, the
/// caller's values were spilled and fetched again inside of its loops (2 % of the tokens/s at 50 %), and
/// every kernel had its own copy for every format.
template <class Type>
__device__ __noinline__ void add_vectors(Channels channels, int rank, Share share, Vector vector, int padded,
                                         int column) {
  // Vectors beyond the last output read the first one.
  const int v = column < padded ? column / Type::kLane : 0;
  vector.data += v * 16;
  vector.extra = Type::extra(v, padded);
  float sum[Type::kSums] = {};
  if (channels.all) {  // of every group of channels the one that is the block's
    vector.data += rank * vector.line;
    vector.line *= kGroup;
    add_channels<Type, true>(channels, share, vector, sum);
  } else {
    add_channels<Type, false>(channels, share, vector, sum);
  }
  if constexpr (Type::kSums > Type::kLane) Type::settle(sum);
  __syncthreads();  // the row has been read
  constexpr int kPitch = sums_pitch(Type::kLane);
  const bool counts = share.counts();
  auto* const sums = reinterpret_cast<float4*>(block_memory()) + threadIdx.x * (kPitch / 4);
#pragma unroll
  for (int i = 0; i < Type::kLane; i += 4)
    sums[i / 4] = counts ? float4{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]} : float4{};
  __syncthreads();
}
__device__ inline void add_format(Format format, const Channels& channels, int rank, const Share& share,
                                  const Lines& lines, int column) {
  const Vector vector{lines.data, static_cast<uint32_t>(lines.line), 0};
  const auto add = [&](auto type) {
    add_vectors<decltype(type)>(channels, rank, share, vector, lines.padded, column);
  };
  switch (format) {
    case Format::f32:
      return add(Plain<float>());
    case Format::f16:
      return add(Plain<__half>());
    case Format::bf16:
      return add(Plain<__nv_bfloat16>());
    case Format::int8:
      return add(Bytes());
    case Format::int4:
      return add(Nibbles());
    case Format::loose_f32:
      return add(Unaligned<float>());
    case Format::loose_f16:
      return add(Unaligned<__half>());
    default:
      return add(Unaligned<__nv_bfloat16>());
  }
}

}  // namespace larosa::cuda
