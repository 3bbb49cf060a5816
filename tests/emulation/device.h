// A device that is emulated, and what tests hand to its launches.
#pragma once

#include <cstring>
#include <vector>

#include "backend/cuda/kernels.h"
#include "products.h"

namespace larosa::cases {

inline constexpr int kShared = 217 << 10;  // an H200's, beside what kernels declare

/// A device of a few multiprocessors, and what its launches share.
struct Device {
  explicit Device(int multiprocessors = 8, int shared = kShared) : sent(cuda::kMostSent), done(1) {
    stream.multiprocessors = multiprocessors;
    stream.shared_bytes = shared;
    chain.done = done.data();
  }
  void gemv(const cuda::Input& in, const std::vector<Product>& products,
            const std::vector<cuda::Skip>& skips = {}, const cuda::Glu& glu = {}) {
    cuda::gemv(stream, in, products, skips, glu, sent.data(), chain);
  }

  cuda::Stream stream;
  std::vector<uint64_t> sent;
  std::vector<uint32_t> done;
  cuda::Chain chain;
};

/// A weight as aligned as memory comes, or one element off.
struct PlacedWeight {
  PlacedWeight(const Weight& from, bool aligned) : weight(from) {
    const auto bytes = static_cast<size_t>(from.bytes());
    const size_t gap = aligned ? 0 : static_cast<size_t>(dtype_size(from.dtype));
    memory.resize((bytes + gap) / sizeof(uint4) + 1);
    weight.data =
        static_cast<char*>(std::memcpy(reinterpret_cast<char*>(memory.data()) + gap, from.data, bytes));
  }
  std::vector<uint4> memory;
  Weight weight;
};

inline cuda::Input row_of(const Mat& x) {
  cuda::Input in;
  in.cols = static_cast<int>(x.cols);
  in.x = x.data;
  return in;
}

}  // namespace larosa::cases
