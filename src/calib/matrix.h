// What calibration and folding make of float64 matrices: everything is computed in double and rounded once,
// when stored.
#pragma once

#include <cstdint>
#include <utility>

#include "base/matrix.h"
#include "base/types.h"

namespace larosa {

class Algebra;

/// (A (D, rank), B (rank, N)): the product A B of that rank that is nearest to m (D, N), its truncated
/// singular value decomposition. From the Gram matrix of the shorter side: what is lost to squaring lies far
/// below the singular values that are kept.
std::pair<Matrix, Matrix> low_rank(const Matrix& m, int64_t rank, Algebra& algebra);

/// gram += diag(gain) Wᵀ W diag(gain), upper triangle only; gain null: ones.   W (out, in); gram (in, in)
void add_gram(const Weight& weight, const float* gain, Matrix& gram, Algebra& algebra);

/// Aᵀ.
Matrix transposed(const Matrix& a);

/// Eigenvectors, as columns by descending eigenvalue, of the symmetric matrix whose upper triangle is `h`,
/// after adding `damping` times the mean of its diagonal to the diagonal (LaRoSA, arXiv 2507.01299 §4.2 and
/// eq. 9; damping 0.01 as in the released code). Every column's entry of largest size is positive, so that
/// equal input gives equal output. Throws Error when they do not converge (non-finite input).
Matrix eigenbasis(const Matrix& h, double damping, Algebra& algebra);

}  // namespace larosa
