// Activations and a(gate) · up, SiLU over the whole range of the exponential.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

// e^−z errs by 2 units, 1 + e^−z by one more, the quotient and the product by one each; results below the
// normal range lose digits.
constexpr double kBound = 6 * kUnit;

void expect_near(const Rows& got, const Rows& truth) {
  EXPECT_TRUE(got.gaps_intact());
  for (int64_t t = 0; t < got.mat.rows; ++t) {
    for (int64_t i = 0; i < got.mat.cols; ++i) {
      const double error = std::fabs(double{got.at(t, i)} - truth.at(t, i));
      EXPECT_LE(error, kBound * std::fabs(truth.at(t, i)) + 1e-37) << truth.at(t, i);
    }
  }
}

TEST(Glu, MatchesTruth) {
  Random random(6);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    SCOPED_TRACE(isa);
    const Cpu cpu(isa, 3);
    for (const int64_t dim : {1, 3, 16, 33, 2048, 5001}) {
      for (const int64_t rows : kRows) {
        const Rows z = Rows(rows, dim).fill(random, 20), up = Rows(rows, dim).fill(random);
        for (const Activation& activation : kActivations) {
          const Rows gate(z), got(rows, dim), truth(rows, dim);
          cpu->glu(gate.mat, up.mat, activation, got.mat);
          ref->glu(gate.mat, up.mat, activation, truth.mat);
          expect_near(got, truth);
          cpu->glu(gate.mat, up.mat, activation, gate.mat);
          EXPECT_EQ(bits_differ(gate.mat, got.mat), 0);
        }
      }
    }
  }
}

/// What neurons are chosen by is what they are multiplied with, and where it is zero they are nothing.
TEST(Glu, ActivateIsItsFirstFactor) {
  Random random(7);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    SCOPED_TRACE(isa);
    const Cpu cpu(isa, 3);
    for (const int64_t rows : {1, 3}) {
      const int64_t dim = 1409;
      const Rows z = Rows(rows, dim).fill(random), up = Rows(rows, dim).fill(random);
      for (const Activation& activation : kActivations) {
        const Rows a(rows, dim), truth(rows, dim), mid(rows, dim), copy(z);
        cpu->activate(z.mat, activation, a.mat);
        ref->activate(z.mat, activation, truth.mat);
        expect_near(a, truth);
        cpu->glu(z.mat, up.mat, activation, mid.mat);
        int64_t zeros = 0;
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t i = 0; i < dim; ++i) {
            const bool both = activation.kind == Activation::drelu;
            EXPECT_EQ(mid.at(t, i), a.at(t, i) * (both ? std::max(0.0f, up.at(t, i)) : up.at(t, i)));
            EXPECT_EQ(a.at(t, i) == 0, truth.at(t, i) == 0);
            zeros += a.at(t, i) == 0;
          }
        }
        EXPECT_EQ(zeros > rows * dim / 3, activation.rests()) << zeros;
        cpu->activate(copy.mat, activation, copy.mat);
        EXPECT_EQ(bits_differ(copy.mat, a.mat), 0);
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
    cpu->glu(gate.mat, up.mat, {}, mid.mat);
    EXPECT_EQ(mid.at(0, 0), 0);
    EXPECT_EQ(mid.at(0, 1), 2000);
    EXPECT_EQ(mid.at(0, 2), inf);
    EXPECT_EQ(mid.at(0, 3), 0);
    EXPECT_TRUE(std::isnan(mid.at(0, 4)));
    for (const Activation& activation : kActivations) {
      if (!activation.rests()) continue;
      cpu->glu(gate.mat, up.mat, activation, mid.mat);
      for (const int64_t i : {0, 3}) EXPECT_EQ(mid.at(0, i), 0);
      EXPECT_EQ(mid.at(0, 2), inf);
      EXPECT_TRUE(std::isnan(mid.at(0, 4)));
    }
  }
}

}  // namespace
}  // namespace larosa
