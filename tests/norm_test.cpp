// RMSNorm, in place and out of place.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

// Squares are summed in float32 over blocks of 1024, so the sum errs by at most sum_bound(1024) and its root
// by half; then three roundings.
TEST(Norm, MatchesTruth) {
  Random random(2);
  const auto ref = make_ref_backend();
  const double bound = sum_bound(1024) / 2 + 4 * kUnit;
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    for (const int64_t dim : {1, 3, 16, 33, 128, 768, 4099}) {
      Rows gain = Rows(1, dim).fill(random);
      for (const float* g : {static_cast<const float*>(nullptr), static_cast<const float*>(gain.mat.data)}) {
        for (const int64_t rows : kRows) {
          Rows x = Rows(rows, dim).fill(random, 30), got(rows, dim), truth(rows, dim);
          cpu->rms_norm(x.mat, g, 1e-5f, got.mat);
          ref->rms_norm(x.mat, g, 1e-5f, truth.mat);
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < dim; ++i) {
              EXPECT_LE(std::fabs(got.at(t, i) - truth.at(t, i)), bound * std::fabs(truth.at(t, i)))
                  << isa << dim;
            }
          }
          EXPECT_TRUE(got.gaps_intact());
          cpu->rms_norm(x.mat, g, 1e-5f, x.mat);
          EXPECT_EQ(bits_differ(x.mat, got.mat), 0);
        }
      }
    }
  }
}

TEST(Norm, ZeroRowStaysZero) {
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 1);
    Rows x(1, 20);
    std::fill_n(x.mat.data, 20, 0.0f);
    cpu->rms_norm(x.mat, nullptr, 1e-5f, x.mat);
    for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(x.at(0, i), 0);
  }
}

}  // namespace
}  // namespace larosa
