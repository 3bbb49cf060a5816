// A product with everything that varies, its true value, and the bound that a float32 result must meet.
#pragma once

#include <vector>

#include "cases.h"

namespace larosa::cases {

/// Several weights that share an input, as q, k, v do.
class ProductCase {
 public:
  ProductCase(int64_t rows, Shape shape, DType dtype, Layout layout, bool bias, bool accumulate,
              uint32_t seed = 1)
      : accumulate_(accumulate), random_(seed), x(Rows(rows, shape.in).fill(random_)) {
    for (const int64_t out : {shape.out, shape.out / 2 + 1}) {
      weights.emplace_back(dtype, layout, shape.in, out, bias, random_);
      start_.push_back(Rows(rows, out).fill(random_));
    }
  }

  /// Fresh results, with their starting values where these count.
  std::vector<Rows> results() const {
    std::vector<Rows> y;
    for (const Rows& s : start_) {
      y.push_back(accumulate_ ? Rows(s) : Rows(s.mat.rows, s.mat.cols));
    }
    return y;
  }
  std::vector<Product> products(const std::vector<Rows>& y) const {
    std::vector<Product> list;
    for (size_t p = 0; p < y.size(); ++p) list.push_back({weights[p].weight, y[p].mat, accumulate_});
    return list;
  }
  std::vector<Rows> run(Backend& backend, Mat rows) const {
    std::vector<Rows> y = results();
    backend.matmul(rows, products(y));
    return y;
  }
  std::vector<Rows> run(Backend& backend) const { return run(backend, x.mat); }
  std::vector<Rows> run_sparse(Backend& backend, const Selection& kept) const {
    std::vector<Rows> y = results();
    backend.sparse_matmul(kept, products(y));
    return y;
  }

  /// Turns everything into its absolute value: the true value of that is Σ|x·w| + |bias| + |y|.
  void absolute_all() {
    absolute(x.mat);
    for (StoredWeight& w : weights) w.absolute();
    for (Rows& s : start_) absolute(s.mat);
  }

 private:
  bool accumulate_;
  Random random_;
  std::vector<Rows> start_;

 public:
  Rows x;
  std::vector<StoredWeight> weights;
};

/// Largest |got − truth| ÷ (bound · magnitude): at most 1 where the bound holds.
inline double worst_ratio(const std::vector<Rows>& got, const std::vector<Rows>& truth,
                          const std::vector<Rows>& magnitude, double bound) {
  double worst = 0;
  for (size_t p = 0; p < got.size(); ++p) {
    if (!got[p].gaps_intact()) return std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < got[p].mat.rows; ++t) {
      for (int64_t j = 0; j < got[p].mat.cols; ++j) {
        const double error = std::fabs(double{got[p].at(t, j)} - truth[p].at(t, j));
        const double ratio = error / (bound * magnitude[p].at(t, j) + 1e-30);
        if (!(ratio <= worst)) worst = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      }
    }
  }
  return worst;
}

}  // namespace larosa::cases
