// float64 matrices for calibration and folding: everything is computed in double and rounded once, when
// stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/types.h"

namespace larosa {

class ThreadPool;

/// Row-major (rows, cols).
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), data(static_cast<size_t>(r * c)) {}
  bool empty() const { return data.empty(); }
  double* row(int64_t i) { return data.data() + i * cols; }
  const double* row(int64_t i) const { return data.data() + i * cols; }
};

/// Matrix products run over tiles of fixed size on the pool, one BLAS thread each, so that the bits do not
/// depend on the number of threads.

/// A B.       A (M, K), B (K, N)
Matrix multiply(const Matrix& a, const Matrix& b, ThreadPool& pool);
/// Aᵀ B.      A (K, M), B (K, N)
Matrix multiply_transposed(const Matrix& a, const Matrix& b, ThreadPool& pool);
/// (A (D, rank), B (rank, N)): the product A B of that rank that is nearest to m (D, N), its truncated
/// singular value decomposition. From the Gram matrix of the shorter side: what is lost to squaring lies far
/// below the singular values that are kept.
std::pair<Matrix, Matrix> low_rank(const Matrix& m, int64_t rank, ThreadPool& pool);

/// Aᵀ.
Matrix transposed(const Matrix& a);
/// H += Xᵀ X, upper triangle only.     X (T, D), H (D, D)
void add_second_moment(const Matrix& x, Matrix& h, ThreadPool& pool);

/// The same of float32 rows: products of one call are summed in float32, calls in float64.    x (T, D)
void add_second_moment(const Mat& x, Matrix& h, ThreadPool& pool);

/// Eigenvectors, as columns by descending eigenvalue, of the symmetric matrix whose upper triangle is `h`,
/// after adding `damping` times the mean of its diagonal to the diagonal (LaRoSA, arXiv 2507.01299 §4.2 and
/// eq. 9; damping 0.01 as in the released code). Every column's entry of largest size is positive, so that
/// equal input gives equal output. Throws Error when LAPACK does not converge (non-finite input).
Matrix eigenbasis(const Matrix& h, double damping);

}  // namespace larosa
