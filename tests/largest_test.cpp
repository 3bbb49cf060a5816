// The largest entries of a row, in order, as they are.
#include "largest.h"

#include <gtest/gtest.h>

namespace larosa {
namespace {

using namespace cases;

TEST(Largest, IsTheBeginningOfTheSortedRow) {
  Random random(5);
  const Cpu cpu(isas()[0], 2);
  const auto ref = make_ref_backend();
  for (const int64_t n : {1, 2, 3, 41, 256, 257, 1001, 32003}) {
    const Rows rows = rows_of_logits(n, random);
    for (int64_t t = 0; t < rows.mat.rows; ++t) {
      const std::vector<Candidate> all = sorted_entries(rows.mat.row(t), n);
      for (const int64_t count : largest_counts(n)) {
        for (Backend* const backend : {ref.get(), cpu.backend.get()}) {
          std::vector<Candidate> found(static_cast<size_t>(count));
          backend->largest(rows.mat.slice(t, 1), found);
          EXPECT_EQ(first_difference(found, all), -1) << n << " row " << t << " count " << count;
        }
      }
    }
  }
}

}  // namespace
}  // namespace larosa
