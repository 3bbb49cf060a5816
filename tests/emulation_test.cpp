// The CUDA backend's decoding products and selections, run on the host
// (tests/emulation): against `ref`, and the laws. What every machine can test of them; the rest is cuda_test,
// which needs a device.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "backend/cuda/kernels.h"
#include "emulation/device.h"
#include "products.h"

namespace larosa {
namespace {

using namespace cases;

/// body(dtype, aligned) for every type.
template <class Body>
void each_type(const Body& body) {
  for (const DType dtype : kTypes) {
    for (const bool aligned : {true, false}) {
      if (!aligned && quantised(dtype)) continue;
      SCOPED_TRACE(std::string(dtype_name(dtype)) + (aligned ? "" : " unaligned"));
      body(dtype, aligned);
    }
  }
}

class Emulation : public testing::Test {
 protected:
  Device device_;
  Random random_{1};
  const std::unique_ptr<Backend> ref_ = make_ref_backend();
};

TEST_F(Emulation, ProductsMatchTruth) {
  std::vector<Shape> shapes = kShapes;
  shapes.push_back({2048, 96});
  for (const Shape s : shapes) {
    SCOPED_TRACE(std::to_string(s.in) + "→" + std::to_string(s.out));
    each_type([&](DType dtype, bool aligned) {
      const ProductCase c(1, s, dtype, Layout::channels, true, true);
      const std::vector<Rows> y = c.results();
      std::vector<Product> products = c.products(y);
      std::vector<PlacedWeight> placed;
      for (const Product& p : products) placed.emplace_back(p.weight, aligned);
      for (size_t p = 0; p < placed.size(); ++p) products[p].weight = placed[p].weight;
      if (cuda::gemv_together(products[0].weight, products[1].weight)) {
        device_.gemv(row_of(c.x.mat), products);
      } else {
        for (const Product& p : products) device_.gemv(row_of(c.x.mat), {p});
      }
      EXPECT_LE(worst_ratio(y, c.run(*ref_), c.tolerances(sum_bound(s.in), true)), 1);
    });
  }
}

/// Weights by outputs: whole products, and of them the outputs of a list, bit for bit.
TEST_F(Emulation, RowsMatchTruth) {
  for (const Shape s : kShapes) {
    SCOPED_TRACE(std::to_string(s.in) + "→" + std::to_string(s.out));
    each_type([&](DType dtype, bool aligned) {
      if (s.out > 1000 && dtype != DType::int4) return;  // more rows than blocks take at once: one type
      const ProductCase c(1, s, dtype, Layout::rows, true, true);
      for (const StoredWeight& w : c.weights) fill_padding(w.weight);
      const std::vector<Rows> y = c.results();
      for (Product p : c.products(y)) {
        const PlacedWeight w(p.weight, aligned);
        p.weight = w.weight;
        cuda::gemv_rows(device_.stream, row_of(c.x.mat), p);
      }
      EXPECT_LE(worst_ratio(y, c.run(*ref_), c.tolerances(sum_bound(s.in), true)), 1);
      const PlacedWeight w(c.weights[0].weight, aligned);
      const Rows all(1, s.out), some(1, s.out), chosen(1, s.out);
      for (int64_t j = 0; j < s.out; ++j)
        chosen.mat.data[j] = j % 3 == 0 ? 0.0f : j % 7 == 0 ? -0.0f : random_.normal();
      std::vector<int32_t> scratch(static_cast<size_t>(1 + s.out));
      cuda::gemv_rows(device_.stream, row_of(c.x.mat), {w.weight, all.mat, false});
      cuda::gemv_outputs(device_.stream, row_of(c.x.mat), {w.weight, some.mat, false}, chosen.mat.data,
                         scratch.data());
      for (int64_t j = 0; j < s.out; ++j) {
        if (chosen.at(0, j) == 0) all.mat.data[j] = 0;
      }
      EXPECT_EQ(bits_differ(some.mat, all.mat), 0);
      EXPECT_TRUE(some.gaps_intact());
      // A norm on the way is the row that it writes down.
      const Rows gain = Rows(1, s.in).fill(random_), norm(1, s.in), truth(1, s.in), normed(1, s.out);
      cuda::Input in = row_of(c.x.mat);
      in.source = cuda::Source::norm;
      in.gain = gain.mat.data, in.eps = 1e-5f, in.values = norm.mat.data;
      cuda::gemv_rows(device_.stream, in, {w.weight, normed.mat, false});
      ref_->rms_norm(Mat(c.x.mat.data, 1, s.in), gain.mat.data, in.eps, truth.mat);
      for (int64_t i = 0; i < s.in; ++i)
        ASSERT_NEAR(norm.at(0, i), truth.at(0, i), 1e-6 * std::fabs(truth.at(0, i)) + 1e-12);
      cuda::gemv_rows(device_.stream, row_of(norm.mat), {w.weight, all.mat, false});
      EXPECT_EQ(bits_differ(normed.mat, all.mat), 0);
    });
  }
}

/// Selections are `ref`'s, from no cut and from their own; the product is that of the row with zeros, bit for
/// bit, and of the whole row where all of it is kept.
TEST_F(Emulation, SparseEqualsDenseOfMaskedRow) {
  Device device(4);  // one group of blocks: launches are few milliseconds then
  for (const int64_t n : {3, 1030}) {
    const Rows x = hard_rows(n, random_);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random_.normal());
    std::vector<float> zeros = scale;  // of either sign, so that what is kept is among equals
    for (size_t i = 0; i < zeros.size(); ++i) zeros[i] = i % 3 == 0 ? zeros[i] : i % 2 ? -0.0f : 0.0f;
    const StoredWeight stored(n % 2 ? DType::int8 : DType::bf16, Layout::channels, n, 136, false, random_);
    const PlacedWeight w(stored.weight, true);
    const auto product = [&](const cuda::Input& in) {
      Rows y(1, 136);
      device.gemv(in, {{w.weight, y.mat, false}});
      return y;
    };
    const auto kept = ref_->make_selection(1, n);
    for (int64_t t = 0; t < x.mat.rows; ++t) {
      const Rows row(1, n), truth(1, n), masked(1, n);
      std::copy_n(x.mat.row(t), n, row.mat.data);
      const auto check = [&](cuda::Input in, int times) {
        ref_->expand(*kept, truth.mat);
        int32_t guess = 0, count = -1;
        in.x = row.mat.data;
        in.cols = static_cast<int>(n);
        in.masked = masked.mat.data;
        in.kept = &count;
        if (in.select == cuda::Selects::topk) in.guess = &guess;
        for (int time = 0; time < times; ++time) {
          const Rows sparse = product(in);
          EXPECT_EQ(count, ref_->count(*kept));
          EXPECT_EQ(bits_differ(masked.mat, truth.mat), 0) << time;
          if (time > 0) continue;
          EXPECT_EQ(bits_differ(sparse.mat, product(row_of(masked.mat)).mat), 0);
          if (count == n) {
            EXPECT_EQ(bits_differ(sparse.mat, product(row_of(row.mat)).mat), 0);
          }
        }
        in.guess = nullptr;
        const Rows alone(1, n);
        cuda::select(device.stream, row.mat, in, alone.mat.data, &count);
        EXPECT_EQ(count, ref_->count(*kept));
        EXPECT_EQ(bits_differ(alone.mat, truth.mat), 0);
      };
      const float* const score_weights[] = {nullptr, scale.data(), zeros.data()};
      for (const float* const weights : score_weights) {
        for (const int64_t keep : keeps(n)) {
          if (weights && keep != n / 2) continue;
          SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t) + " keep " + std::to_string(keep) +
                       (weights == zeros.data() ? " zeros"
                        : weights               ? " scaled"
                                                : ""));
          cuda::Input in;
          in.select = cuda::Selects::topk;
          in.keep = static_cast<int>(keep);
          in.scale = weights;
          ref_->topk(row.mat, in.scale, keep, *kept);
          check(in, 2);
        }
      }
      for (const float cut : {-1.0f, 0.0f, 0.7f, kInf, kNan, -kNan}) {
        SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t) + " cut " + std::to_string(cut));
        cuda::Input in;
        in.select = cuda::Selects::threshold;
        in.cut = cut;
        ref_->threshold(row.mat, nullptr, cut, *kept);
        check(in, 1);
      }
    }
  }
}

/// A norm on the way is the row that it writes down, whichever registers hold it; outputs in more rounds than
/// one are the same; selections are `ref`'s of that row, with score weights too, aligned or not.
TEST_F(Emulation, RowsAreTheSameHoweverTheyAreMade) {
  for (const int64_t in_cols : {2060, 4097, 8200, 12292, 16390}) {
    SCOPED_TRACE(in_cols);
    const int64_t out = in_cols < 3000 ? 9001 : 9;
    const Rows x = Rows(1, in_cols).fill(random_), gain = Rows(1, in_cols).fill(random_), norm(1, in_cols),
               masked(1, in_cols), scale = Rows(1, in_cols).fill(random_);
    const StoredWeight stored(DType::f32, Layout::channels, in_cols, out, false, random_);
    const PlacedWeight w(stored.weight, true);
    const auto product = [&](const cuda::Input& in) {
      Rows y(1, out);
      device_.gemv(in, {{w.weight, y.mat, false}});
      return y;
    };
    for (int64_t i = 0; i < in_cols; ++i) scale.mat.data[i] = std::fabs(scale.at(0, i));
    int32_t count = 0, guess = 0;
    cuda::Input in = row_of(x.mat);
    in.source = cuda::Source::norm;
    in.gain = gain.mat.data;
    in.eps = 1e-5f;
    in.values = norm.mat.data;
    in.select = cuda::Selects::topk;
    in.keep = static_cast<int>(in_cols * 2 / 5);
    in.masked = masked.mat.data;
    in.kept = &count;
    in.guess = &guess;
    for (const float* const weights : std::initializer_list<const float*>{nullptr, scale.mat.data}) {
      in.scale = weights;
      guess = 0;
      const Rows fused = product(in), truth(1, in_cols), alone(1, in_cols);
      EXPECT_EQ(bits_differ(fused.mat, product(in).mat), 0);  // from a cut of before, in every round
      EXPECT_GT(guess, 0);
      EXPECT_EQ(bits_differ(fused.mat, product(row_of(masked.mat)).mat), 0);
      ref_->rms_norm(x.mat, gain.mat.data, 1e-5f, truth.mat);
      for (int64_t i = 0; i < in_cols; ++i)
        ASSERT_NEAR(norm.at(0, i), truth.at(0, i), 1e-6 * std::fabs(truth.at(0, i)) + 1e-12);
      const auto kept = ref_->make_selection(1, in_cols);
      ref_->topk(norm.mat, weights, in.keep, *kept);
      ref_->expand(*kept, truth.mat);
      EXPECT_EQ(bits_differ(masked.mat, truth.mat), 0);
      cuda::Input rule = in;
      rule.source = cuda::Source::row;
      cuda::select(device_.stream, norm.mat, rule, alone.mat.data, &count);
      EXPECT_EQ(bits_differ(alone.mat, truth.mat), 0);
    }
  }
}

/// A row that no block's registers hold is selected from memory, and its product made from where it stands.
TEST_F(Emulation, LongRowsAreReadFromMemory) {
  constexpr int64_t kIn = cuda::kMostHeld + 3, kOut = 9;
  const Rows x = Rows(1, kIn).fill(random_), scale = Rows(1, kIn).fill(random_), masked(1, kIn),
             truth(1, kIn);
  for (int64_t i = 0; i < kIn; ++i) scale.mat.data[i] = std::fabs(scale.at(0, i));
  for (int64_t i = 0; i < kIn; i += 5) x.mat.data[i] = 0.25f;  // ties
  const StoredWeight stored(DType::bf16, Layout::channels, kIn, kOut, false, random_);
  const PlacedWeight w(stored.weight, true);
  ASSERT_FALSE(cuda::gemv_fuses(device_.stream, row_of(x.mat), w.weight));
  const auto kept = ref_->make_selection(1, kIn);
  const auto check = [&](const cuda::Input& in) {
    int32_t count = 0;
    cuda::select(device_.stream, x.mat, in, masked.mat.data, &count);
    ref_->expand(*kept, truth.mat);
    EXPECT_EQ(count, ref_->count(*kept));
    EXPECT_EQ(bits_differ(masked.mat, truth.mat), 0);
  };
  cuda::Input in;
  in.select = cuda::Selects::topk;
  for (const int64_t keep : {int64_t{1}, kIn / 3, kIn * 4 / 5, kIn * 17 / 20, kIn - 1}) {
    SCOPED_TRACE(keep);
    in.keep = static_cast<int>(keep);
    for (const float* const weights : std::initializer_list<const float*>{nullptr, scale.mat.data}) {
      in.scale = weights;
      ref_->topk(x.mat, weights, keep, *kept);
      check(in);
    }
  }
  in.scale = nullptr;
  in.select = cuda::Selects::threshold;
  in.cut = 0.3f;
  ref_->threshold(x.mat, nullptr, in.cut, *kept);
  check(in);
  const Rows y(1, kOut), whole(1, kOut);
  device_.gemv(row_of(masked.mat), {{w.weight, y.mat, false}});
  const Product product{stored.weight, whole.mat, false};
  ref_->matmul(truth.mat, std::span(&product, 1));
  for (int64_t j = 0; j < kOut; ++j) EXPECT_NEAR(y.at(0, j), whole.at(0, j), 1e-3) << j;
}

/// What keeps all of a row adds up in the order of what selects nothing, with a skip too.
TEST_F(Emulation, KeepingAllEqualsDenseBehindASkip) {
  constexpr int64_t kIn = 512, kSkip = 256, kOut = 2048;
  Device device(28);
  const StoredWeight w(DType::bf16, Layout::channels, kIn, kOut, false, random_),
      skip(DType::int8, Layout::channels, kSkip, kOut, false, random_);
  const PlacedWeight pw(w.weight, true), pskip(skip.weight, true);
  const Rows h = Rows(1, kIn).fill(random_), x = Rows(1, kSkip).fill(random_), masked(1, kIn);
  const auto product = [&](cuda::Input in) {
    Rows y(1, kOut);
    device.gemv(in, {{pw.weight, y.mat, false}}, {{x.mat.data, pskip.weight}});
    return y;
  };
  cuda::Input in = row_of(h.mat);
  const Rows dense = product(in);
  int32_t count = 0, guess = 0;
  in.select = cuda::Selects::topk;
  in.keep = kIn;
  in.masked = masked.mat.data, in.kept = &count, in.guess = &guess;
  EXPECT_EQ(bits_differ(product(in).mat, dense.mat), 0);
  EXPECT_EQ(count, kIn);
}

/// A device whose blocks have 99 KB: score weights of the longest rows do not fit beside the bins.
TEST_F(Emulation, SelectionsFitSmallMemory) {
  constexpr int64_t kIn = 18944;
  const Device small(8, (99 << 10) - cuda::kStaticShared);
  const Rows x = Rows(1, kIn).fill(random_), scale(1, kIn), masked(1, kIn), truth(1, kIn);
  for (int64_t i = 0; i < kIn; ++i) scale.mat.data[i] = std::fabs(x.at(0, kIn - 1 - i));
  const auto kept = ref_->make_selection(1, kIn);
  cuda::Input in;
  in.select = cuda::Selects::topk;
  in.keep = kIn / 2;
  in.scale = scale.mat.data;
  int32_t count = 0;
  cuda::select(small.stream, x.mat, in, masked.mat.data, &count);
  ref_->topk(x.mat, in.scale, in.keep, *kept);
  ref_->expand(*kept, truth.mat);
  EXPECT_EQ(bits_differ(masked.mat, truth.mat), 0);
  EXPECT_EQ(count, in.keep);
}

TEST_F(Emulation, RowsThatAreTooLongAreRefused) {
  Device small(8, 64 << 10);
  const int64_t longest = cuda::gemv_longest(small.stream), out = 8;
  const Rows x = Rows(1, longest + 1).fill(random_), y(1, out);
  for (const int64_t n : {longest, longest + 1}) {
    const StoredWeight stored(DType::f32, Layout::channels, n, out, false, random_);
    const PlacedWeight w(stored.weight, true);
    const std::vector<Product> products = {{w.weight, y.mat, false}};
    const auto run = [&] { small.gemv(row_of(Mat(x.mat.data, 1, n)), products); };
    if (n > longest) {
      EXPECT_THROW(run(), Error);
    } else {
      EXPECT_NO_THROW(run());
    }
  }
}

/// One group of blocks with one tile, or several one behind the other, some launches long: sums of another
/// tile or of another launch are never taken for these.
TEST_F(Emulation, SumsOfOtherTilesAndLaunchesDoNotCount) {
  constexpr int64_t kIn = 12;
  Device device(4);
  for (const auto& [dtype, out] : {std::pair(DType::f32, 2000), std::pair(DType::f32, 8000),
                                   std::pair(DType::int4, 4000), std::pair(DType::int4, 16000)}) {
    const StoredWeight stored(dtype, Layout::channels, kIn, out, false, random_);
    const PlacedWeight w(stored.weight, true);
    for (int launch = 0; launch < 4; ++launch) {
      const Rows x = Rows(1, kIn).fill(random_), y(1, out), truth(1, out);
      device.gemv(row_of(x.mat), {{w.weight, y.mat, false}});
      const Product product{stored.weight, truth.mat, false};
      ref_->matmul(x.mat, std::span(&product, 1));
      for (int64_t j = 0; j < out; ++j)
        ASSERT_NEAR(y.at(0, j), truth.at(0, j), 1e-4)
            << dtype_name(dtype) << " " << out << " " << launch << " " << j;
    }
  }
}

TEST_F(Emulation, GatedActivationFollowsItsPair) {
  constexpr int64_t kIn = 257, kOut = 136;
  each_type([&](DType dtype, bool aligned) {
    const Rows x = Rows(1, kIn).fill(random_), gate(1, kOut), up(1, kOut), mid(1, kOut), truth(1, kOut);
    const StoredWeight a(dtype, Layout::channels, kIn, kOut, false, random_),
        b(dtype, Layout::channels, kIn, kOut, false, random_);
    const PlacedWeight wa(a.weight, aligned), wb(b.weight, aligned);
    device_.gemv(row_of(x.mat), {{wa.weight, gate.mat, false}, {wb.weight, up.mat, false}}, {},
                 {{}, mid.mat.data});
    ref_->glu(gate.mat, up.mat, {}, truth.mat);
    for (int64_t j = 0; j < kOut; ++j)
      EXPECT_NEAR(mid.at(0, j), truth.at(0, j), 1e-6 * (1 + std::fabs(truth.at(0, j))));
    EXPECT_TRUE(mid.gaps_intact());
  });
}

TEST_F(Emulation, SkipsAreAdded) {
  constexpr int64_t kIn = 384, kSkip = 320, kTop = 64, kOut = 264;
  for (const DType dtype : kTypes) {
    for (const DType skip_dtype : kTypes) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " after " + dtype_name(skip_dtype));
      const StoredWeight w(dtype, Layout::channels, kIn, kOut, true, random_),
          skip(skip_dtype, Layout::channels, kSkip, kOut, false, random_),
          top(DType::f32, Layout::channels, kTop, kOut, false, random_);
      const PlacedWeight pw(w.weight, true), pskip(skip.weight, true), ptop(top.weight, true);
      const Rows h = Rows(1, kIn).fill(random_), x = Rows(1, kSkip).fill(random_), y(1, kOut), truth(1, kOut);
      ASSERT_TRUE(cuda::gemv_skips(device_.stream, pw.weight, pskip.weight));
      ASSERT_FALSE(cuda::gemv_skips(Device(7).stream, pw.weight, pskip.weight));  // of one group
      device_.gemv(row_of(h.mat), {{pw.weight, y.mat, false}},
                   {{x.mat.data, pskip.weight}, {x.mat.data, ptop.weight}});
      ref_->rotate(x.mat, skip.weight, truth.mat);
      ref_->rotate(Mat(x.mat.data, 1, kTop, x.mat.stride), top.weight, truth.mat, true);
      const Product product{w.weight, truth.mat, true};
      ref_->matmul(h.mat, std::span(&product, 1));
      double error = 0, size = 0;
      for (int64_t j = 0; j < kOut; ++j) {
        error += std::pow(double{y.at(0, j)} - truth.at(0, j), 2);
        size += std::pow(double{truth.at(0, j)}, 2);
      }
      EXPECT_LE(std::sqrt(error), 1e-5 * std::sqrt(size));
      EXPECT_TRUE(y.gaps_intact());
    }
  }
}

/// More groups for the product and for the skip than one, in several rounds.
TEST_F(Emulation, SkipsOfManyGroupsAreAdded) {
  constexpr int64_t kIn = 24, kSkip = 40;
  Device device(28);
  for (const auto& [dtype, skip_dtype] :
       {std::pair(DType::bf16, DType::int8), std::pair(DType::f32, DType::int4)}) {
    for (const int64_t out : {8, 1000, 9000}) {
      SCOPED_TRACE(std::string(dtype_name(dtype)) + " " + std::to_string(out));
      const StoredWeight w(dtype, Layout::channels, kIn, out, true, random_),
          skip(skip_dtype, Layout::channels, kSkip, out, false, random_);
      const PlacedWeight pw(w.weight, true), pskip(skip.weight, true);
      const Rows h = Rows(1, kIn).fill(random_), x = Rows(1, kSkip).fill(random_), y(1, out), truth(1, out);
      ASSERT_TRUE(cuda::gemv_skips(device.stream, pw.weight, pskip.weight));
      device.gemv(row_of(h.mat), {{pw.weight, y.mat, false}}, {{x.mat.data, pskip.weight}});
      ref_->rotate(x.mat, skip.weight, truth.mat);
      const Product product{w.weight, truth.mat, true};
      ref_->matmul(h.mat, std::span(&product, 1));
      for (int64_t j = 0; j < out; ++j) ASSERT_NEAR(y.at(0, j), truth.at(0, j), 3e-4) << j;
      EXPECT_TRUE(y.gaps_intact());
    }
  }
}

}  // namespace
}  // namespace larosa
