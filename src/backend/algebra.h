// The dense linear algebra that calibration and folding spend their time in, in float64: OpenBLAS on the
// host, cuBLAS and cuSOLVER on a device. Matrices are the host's. Equal input gives equal bits on one
// machine, whatever the number of threads.
#pragma once

#include <cstdint>
#include <memory>

#include "base/matrix.h"
#include "base/types.h"

namespace larosa {

class ThreadPool;

/// How exact the sums of a Moment are at least. f32: products of one call are summed in float32, calls in
/// float64 (the host does it in a fraction of the time; a device sums in float64 either way).
enum class Precision { f32, f64 };

/// H = Σ xᵀ x of float32 rows where a backend has them.
class Moment {
 public:
  virtual ~Moment() = default;
  /// H += Xᵀ X.        x (T, D) in the backend's memory
  virtual void add(Mat x) = 0;
  /// (D, D), upper triangle only. Ends the sum: add nothing afterwards.
  virtual Matrix take() = 0;
};

class Algebra {
 public:
  virtual ~Algebra() = default;

  /// A B.       A (M, K), B (K, N)
  virtual Matrix multiply(const Matrix& a, const Matrix& b) = 0;
  /// Aᵀ B.      A (K, M), B (K, N)
  virtual Matrix multiply_transposed(const Matrix& a, const Matrix& b) = 0;
  /// H += Xᵀ X, upper triangle only.     X (T, D), H (D, D)
  virtual void add_second_moment(const Matrix& x, Matrix& h) = 0;
  /// Such a sum over rows in the backend's memory, zero at first.     H (D, D)
  virtual std::unique_ptr<Moment> make_moment(int64_t d, Precision precision) = 0;
  /// The symmetric matrix whose upper triangle is `h` becomes its eigenvectors, as rows by ascending
  /// eigenvalue, of either sign. Throws Error when they do not converge (non-finite input).
  virtual void eigenvectors(Matrix& h) = 0;
  /// The lower triangle of the symmetric `a` becomes L⁻¹, A = L Lᵀ; what stands above it is left to chance.
  /// Throws Error when A is not positive definite (or not finite).
  virtual void invert_factor(Matrix& a) = 0;
};

/// What both ways check of their results, since no library promises a status for what is not finite:
/// OpenBLAS's factor of a NaN is NaN, with info 0.
bool is_finite(const Matrix& m);
/// A lower triangle that is finite with a positive diagonal: behind an infinite one stands 0.
bool is_inverse_factor(const Matrix& m);

/// By OpenBLAS and LAPACK, for backends in host memory. Products run over tiles of fixed size on the pool,
/// one BLAS thread each, so that the bits do not depend on the number of threads.
std::unique_ptr<Algebra> make_host_algebra(ThreadPool& pool);

}  // namespace larosa
