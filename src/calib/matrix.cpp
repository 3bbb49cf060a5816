#include "calib/matrix.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/thread_pool.h"

extern "C" void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda,
                        double* w, double* work, const int* lwork, int* iwork, const int* liwork, int* info);

namespace larosa {
namespace {

constexpr int64_t kTile = 128;  // columns per task: fixed, so that sums do not depend on the threads

int blas_int(int64_t n) {
  return static_cast<int>(n);
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

}  // namespace

Matrix multiply(const Matrix& a, const Matrix& b, ThreadPool& pool) {
  return tiled_product(CblasNoTrans, a, b, pool);
}

Matrix multiply_transposed(const Matrix& a, const Matrix& b, ThreadPool& pool) {
  return tiled_product(CblasTrans, a, b, pool);
}

Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) t.row(j)[i] = a.row(i)[j];
  }
  return t;
}

void add_second_moment(const Matrix& x, Matrix& h, ThreadPool& pool) {
  const int64_t d = x.cols;
  openblas_set_num_threads(1);
  pool.each((d + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, d - first);
    cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, blas_int(count), blas_int(d - first),
                blas_int(x.rows), 1.0, x.data.data() + first, blas_int(d), x.data.data() + first, blas_int(d),
                1.0, h.row(first) + first, blas_int(d));
  });
}

void add_second_moment(const Mat& x, Matrix& h, ThreadPool& pool) {
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

Matrix eigenbasis(const Matrix& h, double damping) {
  const int64_t d = h.rows;
  double mean = 0;
  for (int64_t i = 0; i < d; ++i) mean += h.row(i)[i] / static_cast<double>(d);
  if (!std::isfinite(mean)) fail("calibration: the activations are not finite");
  Matrix a = h;
  for (int64_t i = 0; i < d; ++i) a.row(i)[i] += damping * mean;
  // Row-major upper triangle = column-major lower triangle. One thread: the result is the same on any machine
  // with the same instruction set.
  openblas_set_num_threads(1);
  const int n = blas_int(d);
  std::vector<double> values(static_cast<size_t>(d)), work(1);
  std::vector<int> iwork(1);
  int info = 0, query = -1;
  dsyevd_("V", "L", &n, a.data.data(), &n, values.data(), work.data(), &query, iwork.data(), &query, &info);
  const int lwork = static_cast<int>(work[0]), liwork = iwork[0];
  work.resize(static_cast<size_t>(lwork));
  iwork.resize(static_cast<size_t>(liwork));
  dsyevd_("V", "L", &n, a.data.data(), &n, values.data(), work.data(), &lwork, iwork.data(), &liwork, &info);
  if (info != 0) fail("calibration: the eigenvectors did not converge (LAPACK dsyevd ", info, ")");
  Matrix q(d, d);
  for (int64_t j = 0; j < d; ++j) {
    const double* vector = a.row(d - 1 - j);  // ascending order, column-major: a row here
    int64_t peak = 0;
    for (int64_t i = 1; i < d; ++i) {
      if (std::abs(vector[i]) > std::abs(vector[peak])) peak = i;
    }
    const double sign = vector[peak] < 0 ? -1.0 : 1.0;
    for (int64_t i = 0; i < d; ++i) q.row(i)[j] = sign * vector[i];
  }
  return q;
}

std::pair<Matrix, Matrix> low_rank(const Matrix& m, int64_t rank, ThreadPool& pool) {
  const bool tall = m.rows > m.cols;
  const int64_t d = std::min(m.rows, m.cols);
  CHECK(rank <= d);
  Matrix gram(d, d);
  add_second_moment(tall ? m : transposed(m), gram, pool);
  const Matrix all = eigenbasis(gram, 0);
  Matrix leading(d, rank);
  for (int64_t i = 0; i < d; ++i) std::copy_n(all.row(i), rank, leading.row(i));
  if (tall) return {multiply(m, leading, pool), transposed(leading)};
  Matrix rest = multiply_transposed(leading, m, pool);
  return {std::move(leading), std::move(rest)};
}

}  // namespace larosa
