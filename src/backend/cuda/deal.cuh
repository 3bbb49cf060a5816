// How the outputs of a launch are dealt out to groups of blocks.
#pragma once

#include <algorithm>
#include <limits>

#include "backend/cuda/kernels.h"

namespace larosa::cuda {

/// How outputs are dealt out to groups of blocks: granules, in tiles, of which each group has every
/// `groups`-th.
struct Deal {
  int granule, granules, groups;
  int tiles, least, larger;  // granules of a tile: `least`, and one more in the first `larger` tiles

  __host__ __device__ int outputs() const { return granules * granule; }
  __host__ __device__ int widest() const { return (least + (larger > 0)) * granule; }
};

/// The columns of a tile, which are outputs in the order of vectors (gemv_types.cuh), stand side by side: of
/// a run of the parts, or the same of two parts.
struct Tile {
  int first;    // column
  int half;     // columns of a run, or of each of the two
  int columns;  // in all
};
__device__ inline Tile tile_at(const Deal& d, int t, bool paired) {
  const int half = (d.least + (t < d.larger)) * d.granule;
  return {(t * d.least + min(t, d.larger)) * d.granule, half, paired ? 2 * half : half};
}
inline constexpr int kMostColumns = 4096;  // of a tile

/// Deals granules out evenly, in as many rounds as it takes for every thread to have a vector of `lane`.
inline void deal_out(Deal& d, int threads, int lane, bool paired) {
  for (d.tiles = std::min(d.groups, d.granules);; d.tiles += d.groups) {
    d.least = d.granules / d.tiles, d.larger = d.granules % d.tiles;
    const int widest = d.widest() * (paired ? 2 : 1);
    if (d.tiles >= d.granules || (widest <= threads * lane && widest <= kMostColumns)) return;
  }
}

/// Threads split over a tile's vectors, in as many whole groups as there are. A division takes a block 0.1
/// µs: thread / vectors is thread * magic >> 20, for up to 512 of both.
struct Split {
  int vectors, groups;
  unsigned magic;
};
/// Of tiles of the usual width and of those that are one granule larger.
struct Splits {
  Split usual, larger;
};
inline Splits splits_of(const Deal& d, int threads, int lane, bool paired) {
  const auto split = [&](int granules) {
    const int vectors = granules * d.granule * (paired ? 2 : 1) / lane;
    return Split{vectors, threads / vectors, (1u << 20) / static_cast<unsigned>(vectors) + 1};
  };
  return {split(d.least), split(d.least + 1)};
}

/// How many of so many groups have the skips while the others have the product: those with which the group
/// that takes longest takes least, by the bytes of either (of equal speed), of which the product's groups
/// have `later` each that they could have read before they begin. By plain bytes the skip's groups ended 2 µs
/// after the product's (8 layers of 7B: 997 → 1014 tokens/s at 25 %, 1228 → 1242 at 50 %, level at 75 %).
inline int skip_groups(int groups, const Deal& product, double bytes, double later, const Deal& skip,
                       double skip_bytes) {
  const auto most = [](double total, int granules, int among) {
    return total * ((granules + among - 1) / among) / granules;
  };
  int best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int n = 1; n < groups; ++n) {
    const double bound =
        std::max(most(skip_bytes, skip.granules, n), most(bytes, product.granules, groups - n) + later);
    if (bound < least) least = bound, best = n;
  }
  return best;
}

}  // namespace larosa::cuda
