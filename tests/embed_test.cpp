// Embedding rows: widening is exact, whatever the type and the alignment.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

TEST(Embed, EqualsTruth) {
  Random random(1);
  const auto ref = make_ref_backend();
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    for (const int64_t dim : {1, 3, 16, 33, 768}) {
      for (const DType dtype : kTypes) {
        const StoredWeight table(dtype, Layout::rows, dim, 50, false, random);
        for (const int64_t rows : kRows) {
          std::vector<int32_t> tokens;
          for (int64_t t = 0; t < rows; ++t) tokens.push_back(static_cast<int32_t>(random.below(50)));
          const Rows got(rows, dim), truth(rows, dim);
          cpu->embed(table.weight, tokens, got.mat);
          ref->embed(table.weight, tokens, truth.mat);
          EXPECT_EQ(bits_differ(got.mat, truth.mat), 0) << isa << " " << dim << " " << dtype_name(dtype);
          EXPECT_TRUE(got.gaps_intact());
        }
      }
    }
  }
}

TEST(Embed, EveryHalfValueIsExact) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 1);
    for (const DType dtype : {DType::f16, DType::bf16}) {
      const Weight table{all.data(), nullptr, dtype, Layout::rows, 65536, 1};
      const Rows x(1, 65536);
      const int32_t token = 0;
      cpu->embed(table, std::span(&token, 1), x.mat);
      for (int64_t i = 0; i < 65536; ++i) {
        const float expected = load_element(all.data(), dtype, i), got = x.at(0, i);
        EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : expected == got) << isa << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace larosa
