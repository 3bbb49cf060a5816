// Log-probabilities: relative to the size of the numbers involved, and summing to one.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

TEST(Softmax, MatchesTruth) {
  Random random(7);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    for (const int64_t n : {1, 3, 16, 33, 1025, 32003}) {
      for (const int64_t rows : {1, 3, 17}) {
        for (const float offset : {0.0f, 300.0f}) {
          Rows x = Rows(rows, n).fill(random, 5);
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < n; ++i) x.mat.row(t)[i] += offset;
          }
          const Rows truth(x), start(x);
          cpu->log_softmax(x.mat);
          ref->log_softmax(truth.mat);
          EXPECT_TRUE(x.gaps_intact());
          for (int64_t t = 0; t < rows; ++t) {
            double sum = 0;
            for (int64_t i = 0; i < n; ++i) {
              sum += std::exp(double{x.at(t, i)});
              // Absolute error of log Σ: the relative one of Σ, i.e. of the exponentials and of sums over
              // lanes of blocks of 1024; then two subtractions.
              const double bound = sum_bound(1024) + 4 * kUnit + 2 * kUnit * std::fabs(truth.at(t, i));
              EXPECT_LE(std::fabs(double{x.at(t, i)} - truth.at(t, i)), bound) << isa << " " << n;
            }
            EXPECT_NEAR(sum, 1, 1e-4);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace larosa
