// The largest entries of a row, run on the host.
#include "largest.h"

#include <gtest/gtest.h>

#include "emulation/device.h"

namespace larosa {
namespace {

using namespace cases;

class EmulatedLargest : public testing::Test {
 protected:
  std::vector<Candidate> largest(const Mat& x, int64_t count) {
    constexpr int kMost = cuda::kStretches * cuda::kMostLargest;
    std::vector<float> values(kMost, kNan), value(static_cast<size_t>(count));
    std::vector<int32_t> ids(kMost, -1), id(value.size());
    EXPECT_TRUE(cuda::finds_largest(x.cols, count));
    cuda::largest(device_.stream, x, static_cast<int>(count), {values.data(), ids.data()},
                  {value.data(), id.data()});
    std::vector<Candidate> found;
    for (size_t i = 0; i < value.size(); ++i) found.push_back({value[i], id[i]});
    return found;
  }

  const Device device_;
  Random random_{3};
};

TEST_F(EmulatedLargest, OfOneStretch) {
  for (const int64_t n : {1, 3, 41, 256, 257, 1004, 8200, 16383}) {
    const Rows rows = rows_of_logits(n, random_);
    for (int64_t t = 0; t < rows.mat.rows; ++t) {
      std::vector<uint4> aligned(static_cast<size_t>(n / 4 + 1));
      auto* const copy = reinterpret_cast<float*>(aligned.data());
      std::copy_n(rows.mat.row(t), n, copy);
      const std::vector<Candidate> all = sorted_entries(copy, n);
      for (const int64_t count : largest_counts(n)) {
        if (count > cuda::kMostLargest) continue;
        SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t) + " count " + std::to_string(count));
        EXPECT_EQ(first_difference(largest(rows.mat.slice(t, 1), count), all), -1);
        EXPECT_EQ(first_difference(largest(Mat(copy, 1, n), count), all), -1);
      }
    }
  }
}

/// The shortest row of several stretches, one whose stretches end anywhere, the longest; ties, few entries
/// that are not negative, the largest ones where stretches end.
TEST_F(EmulatedLargest, OfManyStretches) {
  const int64_t longest = cuda::kStretches * (cuda::kMostHeld - 4);
  EXPECT_FALSE(cuda::finds_largest(longest + 1, 1));
  EXPECT_FALSE(cuda::finds_largest(longest, cuda::kMostLargest + 1));
  for (const int64_t n : {int64_t{16385}, int64_t{151937}, longest}) {
    const Rows rows = rows_of_logits(n, random_);
    for (const int64_t t : {1, 7, 9}) {
      SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t));
      EXPECT_EQ(first_difference(largest(rows.mat.slice(t, 1), cuda::kMostLargest),
                                 sorted_entries(rows.mat.row(t), n)),
                -1);
    }
  }
}

}  // namespace
}  // namespace larosa
