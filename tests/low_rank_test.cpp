// Products of low rank: the nearest one to a matrix, and what the decoder makes of them.
#include <gtest/gtest.h>

#include "backend/algebra.h"
#include "calib/matrix.h"
#include "calib/sparsify.h"
#include "model_fixture.h"

namespace larosa {
namespace {

Matrix random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  Matrix m(rows, cols);
  for (double& v : m.data) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    v = static_cast<double>(seed >> 33) * 0x1p-31 - 0.5;
  }
  return m;
}

double squares(const Matrix& m) {
  double sum = 0;
  for (const double v : m.data) sum += v * v;
  return sum;
}

double distance(const Matrix& a, const Matrix& b) {
  Matrix difference = a;
  for (size_t i = 0; i < b.data.size(); ++i) difference.data[i] -= b.data[i];
  return squares(difference);
}

TEST(LowRank, IsTheNearestProduct) {
  ThreadPool pool(2);
  const auto algebra = make_host_algebra(pool);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{40, 17}, {17, 40}, {24, 24}}) {
    const Matrix m = random_matrix(rows, cols, 3);
    double before = squares(m);
    for (const int64_t rank : {int64_t{1}, int64_t{4}, std::min(rows, cols)}) {
      const auto [in, out] = low_rank(m, rank, *algebra);
      ASSERT_EQ(in.cols, rank);
      ASSERT_EQ(out.rows, rank);
      const Matrix product = algebra->multiply(in, out);
      const double off = distance(m, product);
      EXPECT_NEAR(off, squares(m) - squares(product), 1e-9 * squares(m));  // a projection
      EXPECT_LT(off, before);
      before = off;
      // No other product of this rank is nearer: none of those that random subspaces give, for one.
      const Matrix other = random_matrix(rows, rank, 5);
      const auto [basis, rest] =
          low_rank(algebra->multiply(other, random_matrix(rank, cols, 7)), rank, *algebra);
      // The shorter side's factor is the orthonormal one.
      const Matrix projected = rows <= cols ? algebra->multiply(basis, algebra->multiply_transposed(basis, m))
                                            : algebra->multiply(algebra->multiply(m, transposed(rest)), rest);
      EXPECT_LE(off, distance(m, projected) + 1e-9 * squares(m));
    }
    EXPECT_LT(before, 1e-18 * squares(m));
    const Matrix small = algebra->multiply(random_matrix(rows, 3, 9), random_matrix(3, cols, 11));
    const auto [in, out] = low_rank(small, 3, *algebra);
    EXPECT_LT(distance(small, algebra->multiply(in, out)), 1e-18 * squares(small));
  }
}

/// A projection's weight as a product of two: W = W 1 or W = 1 W, in float32.
class Whole {
 public:
  explicit Whole(const Weight& w)
      : values_(static_cast<size_t>(w.in * w.out)),
        one_(static_cast<size_t>(std::min(w.in, w.out) * std::min(w.in, w.out))) {
    const int64_t rank = std::min(w.in, w.out);
    for (int64_t i = 0; i < w.in; ++i) {
      for (int64_t j = 0; j < w.out; ++j)
        values_[static_cast<size_t>(i * w.out + j)] = load_element(w.line(i), w.dtype, j);
    }
    for (int64_t i = 0; i < rank; ++i) one_[static_cast<size_t>(i * rank + i)] = 1;
    const Weight whole{values_.data(), nullptr, DType::f32, Layout::channels, w.in, w.out};
    const Weight one{one_.data(), nullptr, DType::f32, Layout::channels, rank, rank};
    product = w.in <= w.out ? LowRank{one, whole} : LowRank{whole, one};
  }
  LowRank product;

 private:
  std::vector<float> values_, one_;
};

/// What is dropped comes back whole through a product that is the weight itself, whatever was kept.
TEST(LowRank, DroppedEntriesGoThroughIt) {
  TemporaryDir dir;
  ThreadPool pool(2);
  const auto cpu = make_cpu_backend({}, pool), ref = make_ref_backend();
  SparsifyOptions options;
  options.source = source_path("tests/golden/models/llama-biases-f16");
  options.output = dir / "out";
  options.method = "topk";
  options.progress = false;
  sparsify(options, {}, 1, *cpu, pool);
  Model model = load_model(options.output);
  const auto tokens = some_tokens(model.config.vocab, 20);
  const auto dense = all_logits(model, *cpu, tokens, tokens.size(), true);
  EXPECT_GT(relative_rms(all_logits(model, *cpu, tokens, tokens.size()), dense), 0.1);
  std::vector<std::unique_ptr<Whole>> owned;
  for (Layer& layer : model.layers) {
    layer.plan.groups.clear();
    layer.groups.clear();
    for (const Projection p : kProjections) {
      owned.push_back(std::make_unique<Whole>(layer.weights[p]));
      Rule rule;
      rule.select = Select::topk;
      rule.keep = 1 + layer.weights[p].in / 3;
      layer.plan.groups.push_back({{p}, rule, owned.back()->product.in.out});
      layer.groups.push_back({nullptr, {}, {owned.back()->product}});
    }
  }
  model.plan.layers.assign(model.layers.size(), model.layers[0].plan);
  validate(model.plan, plan_shape(model.config), "test");
  for (Backend* backend : {cpu.get(), ref.get()}) {
    for (const size_t chunk : {size_t{1}, size_t{7}, tokens.size()})
      EXPECT_LT(relative_rms(all_logits(model, *backend, tokens, chunk), dense), 1e-5) << chunk;
  }
}

}  // namespace
}  // namespace larosa
