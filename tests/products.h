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

  /// What a result may be off by: `bound` · (Σ|x·w| + |bias| + |y|), and for quantised weights besides, on
  /// the cpu, whose products of more than two rows widen them instead, half a step of every multiplier, which
  /// have 15 bits of the largest one among 64 channels that follow one another in a chain, or among 128
  /// inputs of a row (levels-inl.h, rows-inl.h). With cuda nothing besides for int8, and for int4 `bound` of
  /// Σ|x·scale| times what levels are raised by, in the sum and in what is taken off (Nibbles::kRaised), but
  /// no more than on the cpu.
  std::vector<Rows> tolerances(double bound, bool cuda = false) const {
    std::vector<Rows> all;
    for (size_t p = 0; p < weights.size(); ++p) {
      const Weight& w = weights[p].weight;
      const bool rows = w.layout == Layout::rows;
      const std::vector<float> values = read_weight(w);
      all.emplace_back(x.mat.rows, w.out);
      for (int64_t t = 0; t < x.mat.rows; ++t) {
        for (int64_t j = 0; j < w.out; ++j) {
          double sum =
              (w.bias ? std::fabs(w.bias[j]) : 0.0f) + (accumulate_ ? std::fabs(start_[p].at(t, j)) : 0.0f);
          for (int64_t i = 0; i < w.in; ++i) {
            const int64_t at = rows ? j * w.in + i : i * w.out + j;
            sum += std::fabs(double{x.at(t, i)} * values[static_cast<size_t>(at)]);
          }
          double levels = 0;
          if (quantised(w.dtype) && !cuda && x.mat.rows <= 2)
            levels = rows ? half_steps_of_row(w, t, j) : half_steps(w, t, j);
          if (w.dtype == DType::int4 && !rows && cuda)
            levels = std::min(bound * 2 * 136 * scaled(w, t, j), half_steps(w, t, j));
          all[p].mat.row(t)[j] = static_cast<float>(bound * sum + levels);
        }
      }
    }
    return all;
  }

 private:
  /// Σ|x·scale|
  double scaled(const Weight& w, int64_t t, int64_t j) const {
    double sum = 0;
    for (int64_t i = 0; i < w.in; ++i)
      sum += std::fabs(double{x.at(t, i)} * read_scale(w.line(i), w.dtype, w.out, j));
    return sum;
  }
  double half_steps(const Weight& w, int64_t t, int64_t j) const {
    constexpr int64_t kBlock = 64;
    std::vector<int64_t> listed;
    for (int64_t i = 0; i < w.in; ++i)
      if (x.at(t, i) != 0) listed.push_back(i);
    const auto count = static_cast<int64_t>(listed.size()), half = count / 2;
    double off = 0;
    for (int64_t first = 0, end = 0; first < count; first = end) {
      end = std::min(first + kBlock, first < half ? half : count);
      double largest = 0, levels = 0;
      for (int64_t c = first; c < end; ++c) {
        const int64_t i = listed[static_cast<size_t>(c)];
        const double scale = read_scale(w.line(i), w.dtype, w.out, j);
        float value = 0;
        read_line(w.line(i), w.dtype, w.out, j, 1, &value);
        largest = std::max(largest, std::fabs(x.at(t, i) * scale));
        levels += scale != 0 ? std::fabs(value / scale) : 0;
      }
      off += 0.5001 / 32767 * largest * levels;
    }
    return off;
  }
  double half_steps_of_row(const Weight& w, int64_t t, int64_t j) const {
    const double most = w.dtype == DType::int4 ? 32639 : 32767;  // the former as digits (rows-inl.h)
    std::vector<float> row(static_cast<size_t>(w.in));
    read_line(w.line(j), w.dtype, w.in, 0, w.in, row.data());
    double off = 0;
    for (int64_t first = 0; first < w.in; first += kQuantBlock) {
      double largest = 0, sum = 0;
      for (int64_t i = first; i < std::min(w.in, first + kQuantBlock); ++i) {
        largest = std::max(largest, std::fabs(double{x.at(t, i)}));
        sum += std::fabs(double{row[static_cast<size_t>(i)]});
      }
      off += 0.5001 / most * largest * sum;
    }
    return off;
  }

  bool accumulate_;
  Random random_;
  std::vector<Rows> start_;

 public:
  Rows x;
  std::vector<StoredWeight> weights;
};

/// Largest |got − truth| ÷ tolerance: at most 1 where the bound holds.
inline double worst_ratio(const std::vector<Rows>& got, const std::vector<Rows>& truth,
                          const std::vector<Rows>& tolerance) {
  double worst = 0;
  for (size_t p = 0; p < got.size(); ++p) {
    if (!got[p].gaps_intact()) return std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < got[p].mat.rows; ++t) {
      for (int64_t j = 0; j < got[p].mat.cols; ++j) {
        const double error = std::fabs(double{got[p].at(t, j)} - truth[p].at(t, j));
        const double ratio = error / (double{tolerance[p].at(t, j)} + 1e-30);
        if (!(ratio <= worst)) worst = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      }
    }
  }
  return worst;
}

}  // namespace larosa::cases
