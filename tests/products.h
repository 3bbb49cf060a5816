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

  /// Σ|x·w| + |bias| + |y|, what the error bound of a sum is relative to. int4 kernels sum scale · (16 + q)
  /// and take 24 · scale off at the end: up to 47 scales for a weight of any size.
  std::vector<Rows> magnitudes() const {
    std::vector<Rows> sums;
    for (size_t p = 0; p < weights.size(); ++p) {
      const Weight& w = weights[p].weight;
      sums.emplace_back(x.mat.rows, w.out);
      std::vector<float> sizes = read_weight(w);
      if (w.dtype == DType::int4) {
        for (int64_t i = 0; i < w.in; ++i) {
          for (int64_t j = 0; j < w.out; ++j)
            sizes[static_cast<size_t>(i * w.out + j)] = 47 * read_scale(w.line(i), w.dtype, w.out, j);
        }
      }
      for (int64_t t = 0; t < x.mat.rows; ++t) {
        for (int64_t j = 0; j < w.out; ++j) {
          double sum =
              (w.bias ? std::fabs(w.bias[j]) : 0.0f) + (accumulate_ ? std::fabs(start_[p].at(t, j)) : 0.0f);
          for (int64_t i = 0; i < w.in; ++i) {
            const int64_t at = w.layout == Layout::rows ? j * w.in + i : i * w.out + j;
            sum += std::fabs(double{x.at(t, i)} * sizes[static_cast<size_t>(at)]);
          }
          sums[p].mat.row(t)[j] = static_cast<float>(sum);
        }
      }
    }
    return sums;
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
