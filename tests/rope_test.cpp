// Rotary embedding against double arithmetic on the same float32 angles.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

TEST(Rope, MatchesTruth) {
  Random random(4);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    for (const int64_t width : {2, 6, 64, 128}) {
      std::vector<float> inv_freq;
      for (int64_t i = 0; i < width / 2; ++i) {
        inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * double(i) / double(width))));
      }
      for (const int64_t rows : kRows) {
        for (const int64_t pos : {0, 5, 100000}) {
          const Rows q = Rows(rows, 4 * width).fill(random), k = Rows(rows, 2 * width).fill(random);
          const Rows q0(q), k0(k), q1(q), k1(k);
          cpu->rope(q.mat, k.mat, width, pos, inv_freq.data());
          ref->rope(q1.mat, k1.mat, width, pos, inv_freq.data());
          for (const auto& [got, truth, start] : {std::tie(q, q1, q0), std::tie(k, k1, k0)}) {
            EXPECT_TRUE(got.gaps_intact());
            for (int64_t t = 0; t < rows; ++t) {
              for (int64_t i = 0; i < got.mat.cols; ++i) {
                // Two products and a sum of numbers no longer than the pair.
                const int64_t partner = i % width < width / 2 ? i + width / 2 : i - width / 2;
                const double length = std::hypot(start.at(t, i), start.at(t, partner));
                EXPECT_LE(std::fabs(double{got.at(t, i)} - truth.at(t, i)), 4 * kUnit * length)
                    << isa << width;
              }
            }
          }
        }
      }
    }
  }
}

/// Angles are remembered between calls: other positions, counts and frequencies must not get the old ones.
TEST(Rope, RemembersOnlyWhatIsTheSame) {
  Random random(5);
  const Cpu cpu(isas().front(), 1);
  const std::vector<float> slow = {0.1f, 0.01f}, fast = {0.7f, 0.2f};
  struct Call {
    const std::vector<float>& inv_freq;
    int64_t pos, rows;
  };
  for (const Call& call :
       {Call{slow, 3, 2}, Call{slow, 3, 1}, Call{slow, 3, 4}, Call{slow, 4, 1}, Call{fast, 4, 1}}) {
    const Cpu fresh(isas().front(), 1);
    const Rows q = Rows(call.rows, 8).fill(random), k = Rows(call.rows, 4).fill(random), q1(q), k1(k);
    cpu->rope(q.mat, k.mat, 4, call.pos, call.inv_freq.data());
    fresh->rope(q1.mat, k1.mat, 4, call.pos, call.inv_freq.data());
    EXPECT_EQ(bits_differ(q.mat, q1.mat) + bits_differ(k.mat, k1.mat), 0);
  }
}

}  // namespace
}  // namespace larosa
