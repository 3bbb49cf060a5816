// Selections by clusters of blocks, run on the host: `ref`'s, whatever stands where their parts of a row
// meet.
#include <gtest/gtest.h>

#include <cmath>

#include "emulation/device.h"

namespace larosa {
namespace {

using namespace cases;

class EmulatedSelection : public testing::Test {
 protected:
  EmulatedSelection() { device_.stream.dependent = true; }

  /// What the device selects of rows is what `ref` does.
  void check(Mat x, const cuda::Input& rule) {
    const auto kept = ref_->make_selection(x.rows, x.cols);
    if (rule.select == cuda::Selects::topk) {
      ref_->topk(x, rule.scale, rule.keep, *kept);
    } else {
      ref_->threshold(x, rule.scale, rule.cut, *kept);
    }
    const Rows truth(x.rows, x.cols, 0), masked(x.rows, x.cols, 0);
    ref_->expand(*kept, truth.mat);
    std::vector<int32_t> count(static_cast<size_t>(x.rows), -1);
    cuda::select(device_.stream, x, rule, masked.mat.data, count.data());
    EXPECT_EQ(bits_differ(masked.mat, truth.mat), 0);
    EXPECT_TRUE(masked.gaps_intact());
    int64_t all = 0;
    for (const int32_t n : count) all += n;
    EXPECT_EQ(all, ref_->count(*kept));
  }
  void check_all(Mat x, const float* scale) {
    cuda::Input in;
    in.scale = scale;
    in.select = cuda::Selects::topk;
    for (const int64_t keep : keeps(x.cols)) {
      SCOPED_TRACE("keep " + std::to_string(keep));
      in.keep = static_cast<int>(keep);
      check(x, in);
    }
    in.select = cuda::Selects::threshold;
    for (const float cut : {-1.0f, 0.0f, 0.7f, kInf}) {
      SCOPED_TRACE("cut " + std::to_string(cut));
      in.cut = cut;
      check(x, in);
    }
  }

  Device device_;
  Random random_{5};
  const std::unique_ptr<Backend> ref_ = make_ref_backend();
};

/// The shortest row that blocks share, of which the last one has fewer entries, and rows of which they hold
/// more than two vectors a thread; aligned or not.
TEST_F(EmulatedSelection, OfOneRowMatchesRef) {
  for (const int64_t n : {8200, 16390, 33000}) {
    const Rows x = hard_rows(n, random_);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random_.normal());
    std::vector<uint4> aligned(static_cast<size_t>(n / 4 + 1));
    for (int64_t t = 0; t < x.mat.rows; ++t) {
      SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t));
      if (t % 2 == 0) {
        check_all(x.mat.slice(t, 1), t < 5 ? nullptr : scale.data());
      } else {
        auto* const copy = reinterpret_cast<float*>(aligned.data());
        std::copy_n(x.mat.row(t), n, copy);
        check_all(Mat(copy, 1, n), t < 5 ? scale.data() : nullptr);
      }
    }
  }
}

/// Keys so near to each other that three passes find the cut, with as many equals as are ranked and more.
TEST_F(EmulatedSelection, OfNearlyEqualEntriesMatchesRef) {
  constexpr int64_t kCols = 9000;
  const Rows x(1, kCols);
  for (const int64_t values : {40, 400, 4000}) {
    SCOPED_TRACE(values);
    for (int64_t i = 0; i < kCols; ++i)
      x.mat.data[i] = 1.5f + 0x1p-23f * static_cast<float>(random_.below(values));
    check_all(x.mat, nullptr);
  }
}

/// A cluster for each of several rows, and a block for each where the device has not as many blocks.
TEST_F(EmulatedSelection, OfSeveralRowsMatchesRef) {
  const Rows x = Rows(3, 16400).fill(random_);
  cuda::Input in;
  in.select = cuda::Selects::topk;
  in.keep = 5000;
  for (const int64_t rows : {1, 2, 3}) check(x.mat.slice(0, rows), in);
  in.select = cuda::Selects::threshold;
  in.cut = 0.5f;
  check(x.mat.slice(1, 2), in);
}

/// Parts that no block's registers hold.
TEST_F(EmulatedSelection, OfTheLongestRowsMatchesRef) {
  const Rows x = Rows(1, 4 * cuda::kMostHeld + 9).fill(random_);
  for (int64_t i = 0; i < x.mat.cols; i += 5) x.mat.data[i] = 0.25f;
  cuda::Input in;
  in.select = cuda::Selects::topk;
  for (const int64_t keep : {x.mat.cols / 3, x.mat.cols * 4 / 5}) {
    in.keep = static_cast<int>(keep);
    check(x.mat, in);
  }
}

}  // namespace
}  // namespace larosa
