// Attention of one row, run on the host.
#include <gtest/gtest.h>

#include <cmath>

#include "emulation/device.h"

namespace larosa {
namespace {

using namespace cases;

/// A cache of float32 elements, filled by ref.
struct History {
  History(Backend& ref, int64_t kv_heads, int64_t heads, int64_t width, int64_t length, Random& random)
      : keys(static_cast<size_t>(kv_heads * (length + 1) * width)), values(keys) {
    const KvShape shape{1, kv_heads, width, length + 1, DType::f32};
    cache = ref.make_kv_cache(shape);
    layer = {keys.data(), values.data(), nullptr, nullptr, DType::f32, kv_heads, width, length + 1};
    if (length == 0) return;
    const Rows q(length, heads * width), out(length, heads * width);
    const Rows k = Rows(length, kv_heads * width).fill(random),
               v = Rows(length, kv_heads * width).fill(random);
    ref.attend(q.mat, k.mat, v.mat, *cache, 0, 0, 1, out.mat);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t i = 0; i < kv_heads * width; ++i) {
        const auto at = static_cast<size_t>((i / width * (length + 1) + t) * width + i % width);
        keys[at] = k.at(t, i), values[at] = v.at(t, i);
      }
    }
  }
  std::vector<float> keys, values;
  std::unique_ptr<KvCache> cache;
  cuda::CacheLayer layer;
};

/// One stretch of positions, two, and more than are split evenly, by one block per head or by several that
/// finish together; odd widths; groups of heads that more blocks share.
TEST(EmulatedAttention, OfOneRowMatchesRef) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  Random random{1};
  struct Case {
    int64_t kv_heads, group, width, length, window;
  };
  for (const int multiprocessors : {4, 64}) {
    Device device(multiprocessors);
    for (const Case& c : {Case{2, 1, 64, 0, 0}, Case{2, 1, 128, 80, 0}, Case{1, 3, 20, 330, 100},
                          Case{1, 9, 12, 150, 0}, Case{2, 4, 65, 70, 0}, Case{1, 1, 4, 4500, 0}}) {
      const int64_t heads = c.kv_heads * c.group;
      SCOPED_TRACE(std::to_string(multiprocessors) + ": " + std::to_string(heads) + " heads of " +
                   std::to_string(c.width) + ", " + std::to_string(c.length) + " positions");
      History history(*ref, c.kv_heads, heads, c.width, c.length, random);
      const Rows q = Rows(1, heads * c.width).fill(random), k = Rows(1, c.kv_heads * c.width).fill(random),
                 v = Rows(k).fill(random), out(1, heads * c.width), truth(1, heads * c.width);
      std::vector<float> cosine, sine, inv_freq;
      for (int64_t i = 0; i < c.width / 2; ++i) {
        inv_freq.push_back(1.0f / static_cast<float>(1 + 3 * i));
        const float angle = static_cast<float>(c.length) * inv_freq.back();
        cosine.push_back(std::cos(angle)), sine.push_back(std::sin(angle));
      }
      const cuda::Angles at{cosine.data(), sine.data()};
      const bool turn = c.width % 2 == 0;
      cuda::attend_row(device.stream, q.mat, k.mat, v.mat, history.layer, c.length, c.window, out.mat,
                       turn ? &at : nullptr, device.sent.data(), device.chain);
      if (turn) ref->rope(q.mat, k.mat, c.width, c.length, inv_freq.data());
      ref->attend(q.mat, k.mat, v.mat, *history.cache, 0, c.length, c.window, truth.mat);
      for (int64_t i = 0; i < heads * c.width; ++i) ASSERT_NEAR(out.at(0, i), truth.at(0, i), 3e-5) << i;
      EXPECT_TRUE(out.gaps_intact());
    }
  }
}

}  // namespace
}  // namespace larosa
