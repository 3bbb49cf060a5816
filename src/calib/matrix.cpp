#include "calib/matrix.h"

#include <algorithm>
#include <cmath>

#include "backend/algebra.h"
#include "base/error.h"

namespace larosa {

void add_gram(const Weight& weight, const float* gain, Matrix& gram, Algebra& algebra) {
  Matrix rows(weight.out, weight.in);
  for (int64_t j = 0; j < weight.out; ++j) {
    for (int64_t i = 0; i < weight.in; ++i) {
      const int64_t at = weight.layout == Layout::rows ? j * weight.in + i : i * weight.out + j;
      rows.row(j)[i] = static_cast<double>(load_element(weight.data, weight.dtype, at)) *
                       (gain ? static_cast<double>(gain[i]) : 1.0);
    }
  }
  algebra.add_second_moment(rows, gram);
}

Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) t.row(j)[i] = a.row(i)[j];
  }
  return t;
}

Matrix eigenbasis(const Matrix& h, double damping, Algebra& algebra) {
  const int64_t d = h.rows;
  double mean = 0;
  for (int64_t i = 0; i < d; ++i) mean += h.row(i)[i] / static_cast<double>(d);
  if (!std::isfinite(mean)) fail("calibration: the activations are not finite");
  Matrix a = h;
  for (int64_t i = 0; i < d; ++i) a.row(i)[i] += damping * mean;
  algebra.eigenvectors(a);
  Matrix q(d, d);
  for (int64_t j = 0; j < d; ++j) {
    const double* vector = a.row(d - 1 - j);
    int64_t peak = 0;
    for (int64_t i = 1; i < d; ++i) {
      if (std::abs(vector[i]) > std::abs(vector[peak])) peak = i;
    }
    const double sign = vector[peak] < 0 ? -1.0 : 1.0;
    for (int64_t i = 0; i < d; ++i) q.row(i)[j] = sign * vector[i];
  }
  return q;
}

std::pair<Matrix, Matrix> low_rank(const Matrix& m, int64_t rank, Algebra& algebra) {
  const bool tall = m.rows > m.cols;
  const int64_t d = std::min(m.rows, m.cols);
  CHECK(rank <= d);
  Matrix gram(d, d);
  algebra.add_second_moment(tall ? m : transposed(m), gram);
  const Matrix all = eigenbasis(gram, 0, algebra);
  Matrix leading(d, rank);
  for (int64_t i = 0; i < d; ++i) std::copy_n(all.row(i), rank, leading.row(i));
  if (tall) return {algebra.multiply(m, leading), transposed(leading)};
  Matrix rest = algebra.multiply_transposed(leading, m);
  return {std::move(leading), std::move(rest)};
}

}  // namespace larosa
