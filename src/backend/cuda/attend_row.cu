// Attention of one row over the cache: a block per key/value head and stretch of positions, which also
// rotates the query and appends the new key and value; the last stretches' blocks join what all have. An int8
// cache keeps levels, which are multiplied as they are: the scale of a position is taken up by its score and
// by its weight.
#include <algorithm>

#include "backend/cuda/cache.cuh"
#include "backend/cuda/launch.h"
#include "base/error.h"

namespace larosa::cuda {
namespace {

// 64 positions of 128 entries are eight vectors of keys per thread, and eight of values.
constexpr int kThreads = 256, kSharers = 8, kEarly = 8;

struct Step {
  Mat q, k, v, out;
  CacheLayer cache;
  Angles at;                 // or null: q and k are rotated already
  uint64_t* sent = nullptr;  // by head and stretch: largest score, sum of weights, weighted values
  uint32_t stamp = 0;
  int finishers = 1;                    // stretches whose blocks join them all
  int64_t pos = 0, first = 0, per = 0;  // positions [first, pos], `per` in a stretch
  int group = 0, parts = 1;             // query heads per key/value head; blocks that share them
  float scale = 1;
  Link link;
};

/// Entry e of a head, rotated where angles are given.
__device__ float turned(const float* head, int e, int width, const Angles& at) {
  if (!at.cosine) return __ldcg(head + e);
  const int half = width / 2, i = e % half;
  const float2 pair = rotate_pair(__ldcg(head + i), __ldcg(head + i + half), at.cosine[i], at.sine[i]);
  return e < half ? pair.x : pair.y;
}

/// What some positions have of an entry: their largest score, the sum of exp(score - most), and of that times
/// the values.
struct Joined {
  float most, sum, x;

  __device__ void join(const Joined& b) {
    const float larger = Larger()(most, b.most), fade = expf(most - larger), share = expf(b.most - larger);
    most = larger;
    sum = fmaf(b.sum, share, sum * fade);
    x = fmaf(b.x, share, x * fade);
  }
};
/// Every `step`-th of `count` stretches, from `first` on, `pitch` messages apart: of each the first two
/// messages and its entry's.
__device__ Joined receive_stretches(const uint64_t* sent, int entry, int first, int step, int count,
                                    int64_t pitch, uint32_t stamp) {
  constexpr int kBatch = 4;  // under way at once
  Joined all{-INFINITY, 0, 0};
#pragma unroll 1
  for (int s = first; s < count; s += kBatch * step) {
    Joined one[kBatch];
    bool there;
    do {
      there = true;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (s + u * step >= count) continue;
        const uint64_t* const from = sent + (s + u * step) * pitch;
        there &= receive(from, stamp, one[u].most) & receive(from + 1, stamp, one[u].sum) &
                 receive(from + 2 + entry, stamp, one[u].x);
      }
    } while (!there);
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (s + u * step < count) all.join(one[u]);
  }
  return all;
}

/// Joins the stretches of the block's heads, this finisher's run of their entries. Blocks start in order, so
/// those that wait here keep none from starting; and finishers, which wait for each other too, are no more
/// than the multiprocessors.
__device__ void finish(const Step& a, int first_head, int heads, int finisher) {
  struct ByThread {
    Joined of[kThreads];
  };
  Joined* const joined = block_object<ByThread>().of;
  const int width = static_cast<int>(a.cache.head_dim), stretches = static_cast<int>(gridDim.y);
  const int length = (heads * width + a.finishers - 1) / a.finishers, begin = finisher * length;
  const int side = min(length, kThreads), sharers = kThreads / side;
  const int thread = static_cast<int>(threadIdx.x), sharer = thread / side;
  for (int i = thread % side; i - thread % side < length; i += side) {
    const int entry = begin + i;
    const bool counts = sharer < sharers && i < length && entry < heads * width;
    if (counts) {
      const int64_t pitch = width + 2, head = first_head + entry / width;
      joined[thread] = receive_stretches(a.sent + head * stretches * pitch, entry % width, sharer, sharers,
                                         stretches, pitch, a.stamp);
    }
    __syncthreads();
    if (counts && sharer == 0) {
      Joined all = joined[thread];
      for (int s = 1; s < min(sharers, stretches); ++s) all.join(joined[thread + s * side]);
      a.out.data[first_head * width + entry] = __fdiv_rn(all.x, all.sum);
    }
    __syncthreads();
  }
}

template <class T, int kHeads, int kVector>
__global__ void __launch_bounds__(kThreads) one_row_kernel(const __grid_constant__ Step a) {
  struct ByHead {
    float top[kHeads], total[kHeads];
  };
  float *const top = block_object<ByHead>().top, *const total = block_object<ByHead>().total;
  const int width = static_cast<int>(a.cache.head_dim);
  const int kv_head = static_cast<int>(blockIdx.x) / a.parts, part = static_cast<int>(blockIdx.x) % a.parts;
  const int first_head = kv_head * a.group + part * kHeads, heads = min(kHeads, a.group - part * kHeads);
  const int64_t begin = a.first + blockIdx.y * a.per, end = min(begin + a.per, a.pos + 1);
  const int count = static_cast<int>(end - begin);
  float* const q = reinterpret_cast<float*>(block_memory());  // (kHeads, width)
  float* const sums = q + kHeads * width;                     // (kHeads, kThreads, kVector)
  float* const weight = sums + kHeads * kThreads * kVector;   // (kHeads, per)
  T* const keys = static_cast<T*>(a.cache.keys);
  T* const values = static_cast<T*>(a.cache.values);
  const bool newest = end == a.pos + 1;
  const int64_t place = place_of(a.cache, kv_head, a.pos), new_line = place * width;
  const float *const new_key = a.k.data + kv_head * width, *const new_value = a.v.data + kv_head * width;
  // Pairs of entries, of the queries and but for levels of the new key and value. Which a thread has is known
  // before they are there.
  constexpr int kPairs = (kHeads + 2 + 3) / 4;  // of a thread: all for a width of up to 128
  const int half = (width + 1) / 2, rows = kHeads + (kLevels<T> || !newest ? 0 : 2);
  struct {
    int row, i;
    const float* from;
  } pair[kPairs];
  const auto name_pairs = [&](int first) {
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      auto& p = pair[u];
      const int number = first + u * kThreads + static_cast<int>(threadIdx.x);
      p.row = number / half, p.i = number % half;
      p.from = (p.row < kHeads    ? a.q.data + (first_head + min(p.row, heads - 1)) * width
                : p.row == kHeads ? new_key
                                  : new_value) +
               p.i;
    }
  };
  const auto turn_pairs = [&] {
    float2 x[kPairs] = {}, angle[kPairs] = {};
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const auto& p = pair[u];
      if (p.row >= rows) continue;
      x[u] = {__ldcg(p.from), p.i + half < width ? __ldcg(p.from + half) : 0};
      if (p.row <= kHeads && a.at.cosine) angle[u] = {__ldcg(a.at.cosine + p.i), __ldcg(a.at.sine + p.i)};
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      const auto& p = pair[u];
      if (p.row >= rows) continue;
      if (p.row <= kHeads && a.at.cosine) x[u] = rotate_pair(x[u].x, x[u].y, angle[u].x, angle[u].y);
      if (p.row < kHeads) {
        float* const to = q + p.row * width + p.i;
        to[0] = p.row < heads ? x[u].x * a.scale : 0;
        if (p.i + half < width) to[half] = p.row < heads ? x[u].y * a.scale : 0;
      } else if constexpr (!kLevels<T>) {
        T* const to = (p.row == kHeads ? keys : values) + new_line + p.i;
        narrow(x[u].x, to[0]);
        if (p.i + half < width) narrow(x[u].y, to[half]);
      }
    }
  };
  name_pairs(0);
  // Keys of other positions are there already.
  const auto* const old_keys =
      reinterpret_cast<const char*>(keys + place_of(a.cache, kv_head, begin) * int64_t{width});
  constexpr int kLine = 128;
  for (int at = static_cast<int>(threadIdx.x) * kLine; at < count * width * static_cast<int>(sizeof(T));
       at += kThreads * kLine)
    fetch_to_cache(old_keys + at);
  wait_for_inputs(a.link);
  start_next();
  turn_pairs();
  for (int first = kPairs * kThreads; first < rows * half; first += kPairs * kThreads) {
    name_pairs(first);
    turn_pairs();
  }
  if constexpr (kLevels<T>) {
    if (newest && warp() == 0)
      store_levels([&](int e) { return turned(new_key, e, width, a.at); }, width, keys + new_line,
                   a.cache.key_scales + place);
    if (newest && warp() == 1)
      store_levels([&](int e) { return __ldcg(new_value + e); }, width, values + new_line,
                   a.cache.value_scales + place);
  }
  __syncthreads();

  // Threads share the entries of a value, and the positions. The first values are under way while scores are
  // made.
  using Vector = Piece<T, kVector>;
  const int vectors = width / kVector, lines = kThreads / vectors;
  const int line = static_cast<int>(threadIdx.x) / vectors;
  const auto* const value =
      reinterpret_cast<const Vector*>(values + place_of(a.cache, kv_head, begin) * width) +
      static_cast<int>(threadIdx.x) % vectors;
  const int stop = line < lines ? count : 0;
  Vector early[kEarly];
#pragma unroll
  for (int u = 0; u < kEarly; ++u)
    if (line + u * lines < stop) early[u] = value[(line + u * lines) * vectors];

  // Scores: kSharers threads per position, two positions at once, so that 64 are one wait; the lanes of a
  // warp turn the loop together.
  constexpr int kPositions = kWarp / kSharers, kApart = kThreads / kSharers;
  for (int j = static_cast<int>(threadIdx.x) / kSharers;
       j < (count + kPositions - 1) / kPositions * kPositions; j += 2 * kApart) {
    float dot[2][kHeads] = {}, unit[2] = {1, 1};
    const T* key[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int64_t at = place_of(a.cache, kv_head, begin + min(j + u * kApart, count - 1));
      key[u] = keys + at * width;
      if constexpr (kLevels<T>) unit[u] = a.cache.key_scales[at];
    }
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x) % kSharers * kVector; e < width; e += kSharers * kVector) {
      Vector k[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) k[u] = *reinterpret_cast<const Vector*>(key[u] + e);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float x = q[h * width + e + i];
          dot[0][h] = fmaf(x, widen(k[0].element[i]), dot[0][h]);
          dot[1][h] = fmaf(x, widen(k[1].element[i]), dot[1][h]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = dot[u][h];
#pragma unroll
        for (int step = 1; step < kSharers; step *= 2) score += __shfl_xor_sync(~0u, score, step);
        if constexpr (kLevels<T>) score *= unit[u];
        if (j + u * kApart < count && threadIdx.x % kSharers == 0) weight[h * a.per + j + u * kApart] = score;
      }
    }
  }
  __syncthreads();
  for (int h = warp(); h < heads; h += (kThreads / kWarp)) {
    float* w = weight + h * a.per;
    float most = -INFINITY, sum = 0;
    for (int j = lane(); j < count; j += kWarp) most = Larger()(most, w[j]);
    most = warp_reduce(most, Larger());
    for (int j = lane(); j < count; j += kWarp) {
      const float share = expf(w[j] - most);
      sum += share;
      w[j] = share;
      if constexpr (kLevels<T>) w[j] = share * a.cache.value_scales[place_of(a.cache, kv_head, begin + j)];
    }
    sum = warp_reduce(sum, Add());
    if (lane() == 0) {
      top[h] = most;
      total[h] = sum;
    }
  }
  __syncthreads();

  float sum[kHeads][kVector] = {};
  const auto add = [&](int j, const Vector& v) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        sum[h][i] = fmaf(weight[h * a.per + j], widen(v.element[i]), sum[h][i]);
    }
  };
#pragma unroll
  for (int u = 0; u < kEarly; ++u)
    if (line + u * lines < stop) add(line + u * lines, early[u]);
#pragma unroll 8
  for (int j = line + kEarly * lines; j < stop; j += lines) add(j, value[int64_t{j} * vectors]);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[(h * kThreads + threadIdx.x) * kVector + i] = sum[h][i];
  }
  __syncthreads();
  uint64_t* const sent = a.sent + (first_head * static_cast<int64_t>(gridDim.y) + blockIdx.y) * (width + 2);
  const int64_t of_head = static_cast<int64_t>(gridDim.y) * (width + 2);
  for (int i = static_cast<int>(threadIdx.x); i < heads * width; i += kThreads) {
    const int h = i / width, e = i % width;
    const float* const from = sums + h * kThreads * kVector + e;
    float x = 0;
#pragma unroll 8
    for (int l = 0; l < lines; ++l) x += from[l * width];
    if (gridDim.y == 1) {
      a.out.data[first_head * width + i] = __fdiv_rn(x, total[h]);
    } else {
      send(sent + h * of_head + 2 + e, x, a.stamp);
    }
  }
  const int finisher = static_cast<int>(blockIdx.y) - static_cast<int>(gridDim.y) + a.finishers;
  if (gridDim.y > 1) {
    if (static_cast<int>(threadIdx.x) < heads) {
      send(sent + threadIdx.x * of_head, top[threadIdx.x], a.stamp);
      send(sent + threadIdx.x * of_head + 1, total[threadIdx.x], a.stamp);
    }
    if (finisher >= 0) finish(a, first_head, heads, finisher);
  }
  signal(a.link);
}

/// Query heads of one row that a block takes together, of a key/value head's group.
int64_t heads_together(int64_t group) {
  return group <= 2 ? group : group <= 4 ? 4 : 8;
}
/// Floats of shared memory: queries, scores, and the threads' sums.
int64_t one_row_floats(int64_t heads, int64_t width, int64_t per) {
  return heads * (width + per + kThreads * (width % 4 == 0 ? 4 : 1));
}
/// Messages that the stretches of a row's heads send.
int64_t messages(int64_t heads, int64_t width, int64_t stretches) {
  return heads * stretches * (width + 2);
}
/// Stretches that `count` positions are split into: more than kStretches where their scores would not fit.
int64_t stretches_of(const Stream& s, const Step& a, int64_t count) {
  constexpr int64_t kLength = 64, kStretches = 64;
  const int64_t width = a.cache.head_dim, group = heads_together(a.group);
  const int64_t most = std::min(kStretches, kMostSent / messages(a.group * a.cache.kv_heads, width, 1)),
                room = (s.shared_bytes / 4 - one_row_floats(group, width, 0)) / group;
  return std::max(std::clamp<int64_t>((count + kLength - 1) / kLength, 1, most), (count + room - 1) / room);
}

template <class T, int kHeads>
void launch_one(const Stream& s, Step& a, Chain& chain, dim3 blocks) {
  a.link = chain.link(s);
  const int64_t shared = 4 * one_row_floats(kHeads, a.cache.head_dim, a.per);
  const bool few = blocks.x * blocks.y <= static_cast<unsigned>(s.multiprocessors);
  launch_kernel(s, a.cache.head_dim % 4 == 0 ? one_row_kernel<T, kHeads, 4> : one_row_kernel<T, kHeads, 1>,
                blocks, kThreads, few ? std::max(shared, shared_alone(s)) : shared, a);
  chain.launched(blocks.x * blocks.y);
}

template <class T>
void one_row(const Stream& s, Step& a, Chain& chain) {
  const int64_t count = a.pos + 1 - a.first, most = stretches_of(s, a, count);
  const int heads = static_cast<int>(heads_together(a.group));
  a.per = (count + most - 1) / most;
  const int64_t stretches = (count + a.per - 1) / a.per;  // none of them empty
  a.parts = (a.group + heads - 1) / heads;
  const dim3 blocks(static_cast<unsigned>(a.cache.kv_heads * a.parts), static_cast<unsigned>(stretches));
  a.finishers =
      static_cast<int>(std::clamp<int64_t>(s.multiprocessors / static_cast<int64_t>(blocks.x), 1, stretches));
  if (messages(a.group * a.cache.kv_heads, a.cache.head_dim, stretches) > kMostSent)
    fail("cuda: attention over ", count, " positions by ", a.group * a.cache.kv_heads, " heads of ",
         a.cache.head_dim, " sends more sums than there is room for");
  a.stamp = chain.stamps(1);
  if (heads == 1) return launch_one<T, 1>(s, a, chain, blocks);
  if (heads == 2) return launch_one<T, 2>(s, a, chain, blocks);
  if (heads == 4) return launch_one<T, 4>(s, a, chain, blocks);
  launch_one<T, 8>(s, a, chain, blocks);
}

}  // namespace

void attend_row(const Stream& s, Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window,
                Mat out, const Angles* at, uint64_t* sent, Chain& chain) {
  Step a;
  a.q = q, a.k = k, a.v = v, a.out = out, a.cache = cache;
  if (at) a.at = *at;
  a.sent = sent;
  a.pos = pos;
  a.first = window > 0 ? std::max<int64_t>(0, pos - window + 1) : 0;
  a.group = static_cast<int>(q.cols / k.cols);
  a.scale = score_scale(cache.head_dim);
  if (cache.dtype == DType::f32) return one_row<float>(s, a, chain);
  if (cache.dtype == DType::f16) return one_row<__half>(s, a, chain);
  one_row<int8_t>(s, a, chain);
}

}  // namespace larosa::cuda
