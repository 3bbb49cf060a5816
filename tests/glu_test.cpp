// SiLU(gate) · up over the whole range of the exponential.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

// e^−z errs by 2 units, 1 + e^−z by one more, the quotient and the product by one each; results below the
// normal range lose digits.
constexpr double kBound = 6 * kUnit;

TEST(Glu, MatchesTruth) {
  Random random(6);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    for (const int64_t dim : {1, 3, 16, 33, 2048, 5001}) {
      for (const int64_t rows : kRows) {
        const Rows gate = Rows(rows, dim).fill(random, 20), up = Rows(rows, dim).fill(random);
        const Rows got(rows, dim), truth(rows, dim);
        cpu->glu(gate.mat, up.mat, got.mat);
        ref->glu(gate.mat, up.mat, truth.mat);
        EXPECT_TRUE(got.gaps_intact());
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t i = 0; i < dim; ++i) {
            const double error = std::fabs(double{got.at(t, i)} - truth.at(t, i));
            EXPECT_LE(error, kBound * std::fabs(truth.at(t, i)) + 1e-37) << isa << " " << gate.at(t, i);
          }
        }
        cpu->glu(gate.mat, up.mat, gate.mat);
        EXPECT_EQ(bits_differ(gate.mat, got.mat), 0);
      }
    }
  }
}

TEST(Glu, Extremes) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 1);
    Rows gate(1, 5), up(1, 5), mid(1, 5);
    const float values[] = {-1000, 1000, inf, 0, std::nanf("")};
    for (int64_t i = 0; i < 5; ++i) {
      gate.mat.data[i] = values[i];
      up.mat.data[i] = 2;
    }
    cpu->glu(gate.mat, up.mat, mid.mat);
    EXPECT_EQ(mid.at(0, 0), 0);
    EXPECT_EQ(mid.at(0, 1), 2000);
    EXPECT_EQ(mid.at(0, 2), inf);
    EXPECT_EQ(mid.at(0, 3), 0);
    EXPECT_TRUE(std::isnan(mid.at(0, 4)));
  }
}

}  // namespace
}  // namespace larosa
