// Selection against a sort: exact counts, ties to the lower index, NaN first.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cases.h"

namespace larosa {
namespace {

using namespace cases;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

/// Rows of every kind: random, ties, all equal, zeros, special values, a trend, mostly zeros; and rows that
/// deceive a sample of 256 entries taken at even distances, vectors of 16, 8 or 1 at a time.
std::vector<std::vector<float>> rows_of(int64_t n, Random& random) {
  std::vector<std::vector<float>> rows(11, std::vector<float>(static_cast<size_t>(n)));
  const float special[] = {0.0f,  -0.0f, kTiny, -kTiny, 3 * kTiny, kInf,
                           -kInf, kNan,  -kNan, 1.0f,   -1.0f,     1e30f};
  for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
    rows[0][i] = random.normal();
    rows[1][i] = static_cast<float>(random.below(5)) - 2;  // many ties
    rows[2][i] = -2.5f;
    rows[3][i] = i % 2 ? 0.0f : -0.0f;
    rows[4][i] = special[random.below(std::size(special))];
    rows[5][i] = random.normal() * std::exp(20 * random.normal());
    rows[6][i] = static_cast<float>(i) * 0.01f;
    rows[7][i] = std::max(0.0f, random.normal() - 0.7f);
    rows[8][i] = random.normal() * (i % 256 < 16 ? 1e6f : 1);
    rows[9][i] = random.normal() * (i % 128 < 8 ? 1e-6f : 1);
    rows[10][i] = random.normal() * (i % 16 == 0 ? 1e6f : 1);
  }
  return rows;
}

/// The kept indices by sorting, straight from the definition.
std::vector<int64_t> oracle(const std::vector<float>& x, const float* scale, int64_t keep) {
  const auto score = [&](int64_t i) { return std::fabs(x[size_t(i)]) * (scale ? scale[i] : 1.0f); };
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const float sa = score(a), sb = score(b);
    if (std::isnan(sa) || std::isnan(sb)) return std::isnan(sa) && !std::isnan(sb);
    return sa > sb;
  });
  order.resize(static_cast<size_t>(keep));
  return order;
}

/// Of one row a kept −0 may have lost its sign.
void sign_zeros(Mat y, const Rows& truth) {
  for (int64_t i = 0; i < y.cols; ++i)
    if (y.data[i] == 0 && std::signbit(truth.at(0, i))) y.data[i] = -0.0f;
}

Rows mask(const std::vector<float>& x, const std::vector<int64_t>& kept) {
  Rows y(1, static_cast<int64_t>(x.size()), 0);
  std::fill_n(y.mat.data, x.size(), 0.0f);
  for (int64_t i : kept) y.mat.data[i] = x[size_t(i)];
  return y;
}

template <class Body>
void each_backend(const Body& body) {
  const auto ref = make_ref_backend();
  body(*ref, "ref");
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 3);
    body(*cpu.backend, isa);
  }
}

TEST(Topk, MatchesSort) {
  Random random(11);
  for (const int64_t n : {1, 2, 7, 16, 33, 257, 1024, 4096, 4099}) {
    const auto rows = rows_of(n, random);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random.normal());
    each_backend([&](Backend& backend, const std::string& name) {
      const int64_t count = static_cast<int64_t>(rows.size());
      Rows all(count, n);
      for (int64_t t = 0; t < count; ++t) std::copy_n(rows[size_t(t)].data(), n, all.mat.row(t));
      const auto kept = backend.make_selection(count, n);
      for (const float* s : {static_cast<const float*>(nullptr), static_cast<const float*>(scale.data())}) {
        for (const int64_t keep : keeps(n)) {
          Rows y(count, n);
          backend.topk(all.mat, s, keep, *kept);
          EXPECT_EQ(backend.count(*kept), count * keep);
          backend.expand(*kept, y.mat);
          for (int64_t t = 0; t < count; ++t) {
            SCOPED_TRACE(name + " n " + std::to_string(n) + " keep " + std::to_string(keep) + " row " +
                         std::to_string(t));
            const Rows truth = mask(rows[size_t(t)], oracle(rows[size_t(t)], s, keep));
            EXPECT_EQ(bits_differ(y.mat.slice(t, 1), truth.mat), 0);
            Rows single(1, n);
            backend.topk(all.mat.slice(t, 1), s, keep, *kept);
            EXPECT_EQ(backend.count(*kept), keep);
            backend.expand(*kept, single.mat);
            sign_zeros(single.mat, truth);
            EXPECT_EQ(bits_differ(single.mat, truth.mat), 0);
          }
        }
      }
    });
  }
}

/// What was kept and what was dropped are the row, each with zeros where the other is.
TEST(Expand, KeptAndDroppedAreTheRow) {
  Random random(13);
  for (const int64_t n : {1, 15, 257, 4099}) {
    const Rows x = Rows(3, n).fill(random);
    x.mat.row(1)[n / 2] = kNan;
    each_backend([&](Backend& backend, const std::string& name) {
      const auto kept = backend.make_selection(3, n);
      for (const int64_t rows : {1, 3}) {
        for (const int64_t keep : keeps(n)) {
          const Rows taken(rows, n), left(rows, n), alias(x);
          const Mat from = x.mat.slice(3 - rows, rows), in_place = alias.mat.slice(3 - rows, rows);
          backend.topk(from, nullptr, keep, *kept);
          backend.expand(*kept, taken.mat);
          backend.expand_dropped(*kept, from, left.mat);
          backend.expand_dropped(*kept, in_place, in_place);
          EXPECT_TRUE(left.gaps_intact());
          EXPECT_EQ(bits_differ(in_place, left.mat), 0);
          int64_t wrong = 0;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < n; ++i) {
              const float k = taken.at(t, i), d = left.at(t, i), whole = from.row(t)[i];
              wrong += !(k == 0 || d == 0) || !(k + d == whole || std::isnan(whole));
            }
          }
          EXPECT_EQ(wrong, 0) << name << " n " << n << " rows " << rows << " keep " << keep;
        }
      }
    });
  }
}

TEST(Threshold, MatchesDefinition) {
  Random random(12);
  for (const int64_t n : {1, 15, 257, 4099}) {
    const auto rows = rows_of(n, random);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random.normal());
    each_backend([&](Backend& backend, const std::string& name) {
      const auto kept = backend.make_selection(3, n);
      for (const auto& row : rows) {
        Rows x(3, n);
        for (int64_t t = 0; t < 3; ++t) std::copy_n(row.data(), n, x.mat.row(t));
        for (const float* s : {static_cast<const float*>(nullptr), static_cast<const float*>(scale.data())}) {
          for (const float cut : {-1.0f, -0.0f, 0.0f, kTiny, 0.7f, 2.0f, kInf}) {
            std::vector<int64_t> expected;
            for (int64_t i = 0; i < n; ++i) {
              if (!(std::fabs(row[size_t(i)]) * (s ? s[i] : 1.0f) <= cut)) expected.push_back(i);
            }
            const Rows truth = mask(row, expected);
            for (const int64_t count : {1, 3}) {
              Rows y(count, n);
              backend.threshold(x.mat.slice(0, count), s, cut, *kept);
              EXPECT_EQ(backend.count(*kept), count * static_cast<int64_t>(expected.size())) << name << cut;
              backend.expand(*kept, y.mat);
              for (int64_t t = 0; t < count; ++t) {
                if (count == 1) sign_zeros(y.mat, truth);
                EXPECT_EQ(bits_differ(y.mat.slice(t, 1), truth.mat), 0);
              }
            }
          }
        }
      }
    });
  }
}

}  // namespace
}  // namespace larosa
