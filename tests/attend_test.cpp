// Attention over the cache: grouped heads, windows, chunked prompts, both cache types.
#include <gtest/gtest.h>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

/// All outputs of a case, call after call.
std::vector<Rows> run(Backend& backend, const AttendCase& c, DType dtype) {
  Random random(8);
  int64_t total = 0;
  for (int64_t rows : c.steps) total += rows;
  const auto cache = backend.make_kv_cache({2, c.kv_heads, c.width, total, dtype});
  const int64_t bytes = dtype == DType::int8 ? c.width + 4 : dtype == DType::f16 ? 2 * c.width : 4 * c.width;
  EXPECT_EQ(cache->bytes_per_token(), 2 * 2 * c.kv_heads * bytes);
  std::vector<Rows> outputs;
  int64_t pos = 0;
  for (const int64_t rows : c.steps) {
    for (const int64_t layer : {0, 1}) {
      const Rows q = Rows(rows, c.heads * c.width).fill(random, 1.5f);
      const Rows k = Rows(rows, c.kv_heads * c.width).fill(random);
      const Rows v = Rows(rows, c.kv_heads * c.width).fill(random);
      outputs.emplace_back(rows, c.heads * c.width);
      backend.attend(q.mat, k.mat, v.mat, *cache, layer, pos, c.window, outputs.back().mat);
      EXPECT_TRUE(outputs.back().gaps_intact());
    }
    pos += rows;
  }
  return outputs;
}

/// A score errs by sum_bound(E + 2) of Σ|q·k|/√E (below 8·1.5·√E here: each entry is normal), its weight
/// relatively by as much; the mean of values (below 6) by that and by the sums over n positions, both kept
/// per chunk of 256. With int8 both sides store the same levels and scales; the scale is one rounding more in
/// a score and one in the weight of a value.
double bound(const AttendCase& c, int64_t positions) {
  const double score = sum_bound(c.width + 2) * 8 * 1.5 * std::sqrt(double(c.width));
  const double chunks = double(positions) / 256 + 1;
  return 6 * (2 * score + 2 * sum_bound(257) + 8 * chunks * kUnit);
}

TEST(Attend, MatchesTruth) {
  const auto ref = make_ref_backend();
  for (const AttendCase& c : kAttendCases) {
    for (const DType dtype : kKvTypes) {
      const std::vector<Rows> truth = run(*ref, c, dtype);
      int64_t positions = 0;
      for (int64_t rows : c.steps) positions += rows;
      for (const std::string& isa : isas()) {
        const Cpu cpu(isa, 2);
        const std::vector<Rows> got = run(*cpu.backend, c, dtype);
        double worst = 0;
        for (size_t s = 0; s < got.size(); ++s) {
          for (int64_t t = 0; t < got[s].mat.rows; ++t) {
            for (int64_t i = 0; i < got[s].mat.cols; ++i) {
              const double error = std::fabs(double{got[s].at(t, i)} - truth[s].at(t, i));
              worst = error <= worst ? worst : error;
            }
          }
        }
        EXPECT_LE(worst, bound(c, positions))
            << isa << " " << dtype_name(dtype) << " heads " << c.heads << " width " << c.width;
      }
    }
  }
}

TEST(Attend, ThreadsChangeNoBit) {
  for (const AttendCase& c : kAttendCases) {
    for (const DType dtype : {DType::f16, DType::int8}) {
      const Cpu one(isas().front(), 1);
      const std::vector<Rows> expected = run(*one.backend, c, dtype);
      for (const int threads : kThreads) {
        const Cpu cpu(isas().front(), threads);
        const std::vector<Rows> got = run(*cpu.backend, c, dtype);
        for (size_t s = 0; s < got.size(); ++s) EXPECT_EQ(bits_differ(got[s].mat, expected[s].mat), 0);
      }
    }
  }
}

/// An int8 cache keeps each entry within half a level of the largest of its head (plus roundings), tiny heads
/// as zero; what is not finite stays visible. One position: its output is the stored value.
TEST(Attend, Int8KeepsAValueWithinHalfALevel) {
  Random random(10);
  const int64_t width = 37;
  Rows value = Rows(4, width).fill(random);
  for (int64_t e = 0; e < width; ++e) {
    value.mat.row(1)[e] *= 1e-20f;
    value.mat.row(2)[e] *= 1e-35f;
  }
  value.mat.row(3)[5] = std::numeric_limits<float>::infinity();
  const Rows q = Rows(1, width).fill(random);
  const auto expect = [&](Backend& backend, const std::string& name) {
    for (int64_t t = 0; t < 4; ++t) {
      const auto cache = backend.make_kv_cache({1, 1, width, 1, DType::int8});
      const Mat v = value.mat.slice(t, 1);
      const Rows out(1, width);
      backend.attend(q.mat, q.mat, v, *cache, 0, 0, 0, out.mat);
      float most = 0;
      for (int64_t e = 0; e < width; ++e) most = std::max(most, std::fabs(v.data[e]));
      for (int64_t e = 0; e < width; ++e) {
        const float got = out.at(0, e);
        if (t == 3) {
          EXPECT_TRUE(std::isnan(got)) << name;
        } else if (t == 2) {
          EXPECT_EQ(got, 0) << name;
        } else {
          EXPECT_LE(std::fabs(got - v.data[e]), most * (0.5 / 127 + 8 * kUnit)) << name << " row " << t;
        }
      }
    }
  };
  expect(*make_ref_backend(), "ref");
  for (const std::string& isa : isas()) expect(*Cpu(isa, 1).backend, isa);
}

/// Going back in the timeline overwrites what was there.
TEST(Attend, RewindsToAnEarlierPosition) {
  Random random(9);
  const Rows q = Rows(10, 32).fill(random), k = Rows(10, 16).fill(random), v = Rows(10, 16).fill(random);
  const Rows other = Rows(10, 16).fill(random);
  const Cpu cpu(isas().front(), 1);
  const KvShape shape{1, 1, 16, 10, DType::f32};
  const auto once = cpu->make_kv_cache(shape), twice = cpu->make_kv_cache(shape);
  const Rows a(10, 32), b(10, 32);
  cpu->attend(q.mat, k.mat, v.mat, *once, 0, 0, 0, a.mat);
  cpu->attend(q.mat, other.mat, other.mat, *twice, 0, 0, 0, b.mat);
  cpu->attend(q.mat, k.mat, v.mat, *twice, 0, 0, 0, b.mat);
  EXPECT_EQ(bits_differ(a.mat, b.mat), 0);
}

}  // namespace
}  // namespace larosa
