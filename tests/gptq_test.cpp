// Rounding by moments: with nothing to compensate it is the nearest rounding, else the products are nearer.
#include "calib/gptq.h"

#include "backend/algebra.h"
#include "base/quant.h"
#include "base/thread_pool.h"
#include "cases.h"
#include "model_fixture.h"

namespace larosa {
namespace {

struct Case {
  explicit Case(int64_t n, int64_t out, bool correlated) : in(n), moments(n, n), inputs(4 * n, n) {
    cases::Random random(3);
    values.resize(static_cast<size_t>(n * out));
    for (float& v : values) v = 0.05f * random.normal();
    weight = {values.data(), nullptr, DType::f32, Layout::channels, n, out};
    for (int64_t t = 0; t < inputs.rows; ++t) {
      const double common = double{random.normal()};
      for (int64_t i = 0; i < n; ++i)
        inputs.row(t)[i] =
            double{random.normal()} * static_cast<double>(i % 7 + 1) + (correlated ? 3 * common : 0);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        if (!correlated && i != j) continue;
        for (int64_t t = 0; t < inputs.rows; ++t) moments.row(i)[j] += inputs.row(t)[i] * inputs.row(t)[j];
      }
    }
  }
  FoldedTensor rounded(DType t, int threads, Layout layout = Layout::channels) const {
    ThreadPool pool(threads);
    const RoundingFactor factor = rounding_factor(Matrix(moments), 0.01, *make_host_algebra(pool));
    std::vector<float> turned(values.size());
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < weight.out; ++j)
        turned[static_cast<size_t>(j * in + i)] = values[static_cast<size_t>(i * weight.out + j)];
    }
    Weight w = weight;
    w.layout = layout;
    if (layout == Layout::rows) w.data = turned.data();
    return round_by_moments("w", w, t, factor, pool);
  }
  FoldedTensor nearest(DType t, Layout layout = Layout::channels) const {
    ThreadPool pool(1);
    Matrix wide(in, weight.out);
    std::copy(values.begin(), values.end(), wide.data.begin());
    return stored_tensor("w", layout == Layout::rows ? transposed(wide) : wide, t, pool);
  }
  /// Σ over inputs and outputs of the squared difference of the products.
  double loss(const FoldedTensor& tensor, DType t, Layout layout = Layout::channels) const {
    const Weight stored{tensor.bytes.data(), nullptr, t, layout, in, weight.out};
    const std::vector<float> read = read_weight(stored);
    double sum = 0;
    for (int64_t r = 0; r < inputs.rows; ++r) {
      for (int64_t j = 0; j < weight.out; ++j) {
        double miss = 0;
        for (int64_t i = 0; i < in; ++i) {
          const auto at = static_cast<size_t>(i * weight.out + j);
          const auto stands = layout == Layout::rows ? static_cast<size_t>(j * in + i) : at;
          miss += inputs.row(r)[i] * (double{values[at]} - double{read[stands]});
        }
        sum += miss * miss;
      }
    }
    return sum;
  }

  int64_t in;
  Matrix moments, inputs;
  std::vector<float> values;
  Weight weight;
};

TEST(Gptq, IsNearestWhereInputsAreUncorrelated) {
  for (const DType t : {DType::int8, DType::int4}) {
    for (const Layout layout : cases::kLayouts) {
      const Case c(150, 700, false);
      EXPECT_TRUE(c.rounded(t, 2, layout).bytes == c.nearest(t, layout).bytes) << dtype_name(t);
      Case none(40, 129, false);  // no input at all
      std::fill(none.moments.data.begin(), none.moments.data.end(), 0.0);
      EXPECT_TRUE(none.rounded(t, 2, layout).bytes == none.nearest(t, layout).bytes) << dtype_name(t);
    }
  }
}

TEST(Gptq, ProductsAreNearerThanNearest) {
  for (const DType t : {DType::int8, DType::int4}) {
    for (const Layout layout : cases::kLayouts) {
      const Case c(150, 200, true);
      EXPECT_LT(c.loss(c.rounded(t, 1, layout), t, layout), 0.7 * c.loss(c.nearest(t, layout), t, layout))
          << dtype_name(t) << (layout == Layout::rows ? " rows" : " channels");
    }
  }
}

TEST(Gptq, ThreadsDoNotChangeABit) {
  const Case c(150, 1500, true);
  for (const Layout layout : cases::kLayouts) {
    const auto one = c.rounded(DType::int4, 1, layout).bytes;
    for (const int threads : {2, 3}) EXPECT_TRUE(c.rounded(DType::int4, threads, layout).bytes == one);
  }
}

TEST(Gptq, RefusesWhatIsNotFinite) {
  Case c(20, 30, true);
  c.values[77] = std::numeric_limits<float>::infinity();
  EXPECT_NE(message_of([&] { c.rounded(DType::int4, 2); }).find("tensor w: holds inf"), std::string::npos);
  Case d(20, 30, true);
  d.moments.row(3)[3] = std::nan("");
  EXPECT_NE(message_of([&] { d.rounded(DType::int4, 2); }).find("not finite"), std::string::npos);
}

}  // namespace
}  // namespace larosa
