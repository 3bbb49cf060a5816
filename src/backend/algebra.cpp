#include "backend/algebra.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"

extern "C" {
void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda, double* w,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info);
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void dtrtri_(const char* uplo, const char* diag, const int* n, double* a, const int* lda, int* info);
}

namespace larosa {
namespace {

constexpr int64_t kTile = 128;  // columns per task: fixed, so that sums do not depend on the threads

int blas_int(int64_t n) {
  return static_cast<int>(n);
}

bool finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double v) { return std::isfinite(v); });
}

/// C = op(A) B by column tiles.
Matrix tiled_product(CBLAS_TRANSPOSE op, const Matrix& a, const Matrix& b, ThreadPool& pool) {
  const int64_t m = op == CblasNoTrans ? a.rows : a.cols, k = op == CblasNoTrans ? a.cols : a.rows;
  CHECK(k == b.rows);
  openblas_set_num_threads(1);
  Matrix c(m, b.cols);
  pool.each((b.cols + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, b.cols - first);
    cblas_dgemm(CblasRowMajor, op, CblasNoTrans, blas_int(m), blas_int(count), blas_int(k), 1.0,
                a.data.data(), blas_int(a.cols), b.data.data() + first, blas_int(b.cols), 0.0,
                c.data.data() + first, blas_int(c.cols));
  });
  return c;
}

void add_moment(const Matrix& x, Matrix& h, ThreadPool& pool) {
  const int64_t d = x.cols;
  openblas_set_num_threads(1);
  pool.each((d + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, d - first);
    cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, blas_int(count), blas_int(d - first),
                blas_int(x.rows), 1.0, x.data.data() + first, blas_int(d), x.data.data() + first, blas_int(d),
                1.0, h.row(first) + first, blas_int(d));
  });
}

/// The same, summed in float32.
void add_moment(const Mat& x, Matrix& h, ThreadPool& pool) {
  const int64_t d = x.cols;
  openblas_set_num_threads(1);
  pool.each((d + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, d - first), width = d - first;
    std::vector<float> sum(static_cast<size_t>(count * width));
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, blas_int(count), blas_int(width), blas_int(x.rows),
                1.0f, x.data + first, blas_int(x.stride), x.data + first, blas_int(x.stride), 0.0f,
                sum.data(), blas_int(width));
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = i; j < width; ++j)
        h.row(first + i)[first + j] += static_cast<double>(sum[static_cast<size_t>(i * width + j)]);
    }
  });
}

class HostMoment final : public Moment {
 public:
  HostMoment(int64_t d, Precision precision, ThreadPool& pool)
      : h_(d, d), precision_(precision), pool_(pool) {}
  void add(Mat x) override {
    CHECK(x.cols == h_.cols);
    if (precision_ == Precision::f32) return add_moment(x, h_, pool_);
    Matrix wide(x.rows, x.cols);
    for (int64_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), x.cols, wide.row(t));
    add_moment(wide, h_, pool_);
  }
  Matrix take() override { return std::move(h_); }

 private:
  Matrix h_;
  const Precision precision_;
  ThreadPool& pool_;
};

class HostAlgebra final : public Algebra {
 public:
  explicit HostAlgebra(ThreadPool& pool) : pool_(pool) {}

  Matrix multiply(const Matrix& a, const Matrix& b) override {
    return tiled_product(CblasNoTrans, a, b, pool_);
  }
  Matrix multiply_transposed(const Matrix& a, const Matrix& b) override {
    return tiled_product(CblasTrans, a, b, pool_);
  }
  void add_second_moment(const Matrix& x, Matrix& h) override { add_moment(x, h, pool_); }
  std::unique_ptr<Moment> make_moment(int64_t d, Precision precision) override {
    return std::make_unique<HostMoment>(d, precision, pool_);
  }

  // Row-major upper is column-major lower and the reverse. One thread: the result is the same on any machine
  // with the same instruction set.
  void eigenvectors(Matrix& h) override {
    openblas_set_num_threads(1);
    const int n = blas_int(h.rows);
    std::vector<double> values(static_cast<size_t>(h.rows)), work(1);
    std::vector<int> iwork(1);
    int info = 0, query = -1;
    dsyevd_("V", "L", &n, h.data.data(), &n, values.data(), work.data(), &query, iwork.data(), &query, &info);
    const int lwork = static_cast<int>(work[0]), liwork = iwork[0];
    work.resize(static_cast<size_t>(lwork));
    iwork.resize(static_cast<size_t>(liwork));
    dsyevd_("V", "L", &n, h.data.data(), &n, values.data(), work.data(), &lwork, iwork.data(), &liwork,
            &info);
    if (info != 0 || !is_finite(h))
      fail("calibration: the eigenvectors did not converge (LAPACK dsyevd ", info, ")");
  }
  void invert_factor(Matrix& a) override {
    openblas_set_num_threads(1);
    const int n = blas_int(a.rows);
    int info = 0;
    dpotrf_("U", &n, a.data.data(), &n, &info);
    if (info == 0) dtrtri_("U", "N", &n, a.data.data(), &n, &info);
    if (info != 0 || !is_inverse_factor(a))
      fail("rounding: the inputs' moments have no factor (LAPACK ", info, "), are they finite?");
  }

 private:
  ThreadPool& pool_;
};

}  // namespace

bool is_finite(const Matrix& m) {
  return finite(m.data.data(), m.rows * m.cols);
}
bool is_inverse_factor(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i)
    if (!finite(m.row(i), i + 1) || !(m.row(i)[i] > 0)) return false;
  return true;
}

std::unique_ptr<Algebra> make_host_algebra(ThreadPool& pool) {
  return std::make_unique<HostAlgebra>(pool);
}

}  // namespace larosa
