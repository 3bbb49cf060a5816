#include "backend/cuda/algebra.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <vector>

#include "backend/cuda/handle.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/one_row.h"
#include "base/error.h"

namespace larosa::cuda {
namespace {

constexpr int64_t kDouble = sizeof(double);

using cuda::check;
void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuda: cuBLAS: ", what, ": ", cublasGetStatusString(status));
}
void check(cusolverStatus_t status, const char* what) {
  if (status != CUSOLVER_STATUS_SUCCESS)
    fail("cuda: cuSOLVER: ", what, ": status ", static_cast<int>(status));
}

int blas_int(int64_t n) {
  return static_cast<int>(n);
}

/// The libraries on a stream.
class Libraries {
 public:
  explicit Libraries(cudaStream_t stream) {
    check(cublasCreate(blas.out()), "handle");
    check(cublasSetStream(blas, stream), "stream");
    check(cusolverDnCreate(solver.out()), "handle");
    check(cusolverDnSetStream(solver, stream), "stream");
    check(cusolverDnSetDeterministicMode(solver, CUSOLVER_DETERMINISTIC_RESULTS), "mode");
    check(cusolverDnCreateParams(parameters.out()), "parameters");
  }

  Handle<cublasHandle_t, cublasDestroy> blas;
  Handle<cusolverDnHandle_t, cusolverDnDestroy> solver;
  Handle<cusolverDnParams_t, cusolverDnDestroyParams> parameters;
};

/// The libraries' matrices are column-major: a row-major matrix is its transpose to them, an upper triangle a
/// lower one.
constexpr cublasFillMode_t kUpper = CUBLAS_FILL_MODE_LOWER, kLower = CUBLAS_FILL_MODE_UPPER;

/// H (D, D) += Xᵀ X, upper triangle.        x (T, D) and h on the device
void add_moment(cublasHandle_t blas, const double* x, int64_t rows, int64_t d, double* h) {
  const double one = 1;
  check(cublasDsyrk(blas, kUpper, CUBLAS_OP_N, blas_int(d), blas_int(rows), &one, x, blas_int(d), &one, h,
                    blas_int(d)),
        "syrk");
}

void fetch(const Stream& s, const void* from, Matrix& to) {
  check(cudaMemcpyAsync(to.data.data(), from, to.data.size() * kDouble, cudaMemcpyDeviceToHost, s.stream),
        "copy");
  check(cudaStreamSynchronize(s.stream), "algebra");
}

class CudaMoment final : public Moment {
 public:
  CudaMoment(const Stream& stream, OneRow& row, cublasHandle_t blas, Buffer& wide, int64_t d)
      : stream_(stream), row_(row), blas_(blas), wide_(wide), d_(d) {
    const int64_t bytes = d * d * kDouble;
    check(cudaMemsetAsync(sum_.at_least(bytes), 0, static_cast<size_t>(bytes), stream.stream), "memory");
  }
  void add(Mat x) override {
    CHECK(x.cols == d_);
    if (x.rows == 0) return;
    row_.flush();
    auto* const wide = static_cast<double*>(wide_.at_least(x.rows * d_ * kDouble));
    widen_rows(stream_, x, wide);
    add_moment(blas_, wide, x.rows, d_, sum_.get<double>());
  }
  Matrix take() override {
    Matrix h(d_, d_);
    fetch(stream_, sum_.get<void>(), h);
    return h;
  }

 private:
  const Stream& stream_;
  OneRow& row_;
  const cublasHandle_t blas_;
  Buffer& wide_;  // rows in float64, of whichever moment is added to
  const int64_t d_;
  Buffer sum_;
};

class CudaAlgebra final : public Algebra {
 public:
  CudaAlgebra(const Stream& stream, OneRow& row) : stream_(stream), row_(row), libraries_(stream.stream) {}

  Matrix multiply(const Matrix& a, const Matrix& b) override { return product(a, b, false); }
  Matrix multiply_transposed(const Matrix& a, const Matrix& b) override { return product(a, b, true); }

  void add_second_moment(const Matrix& x, Matrix& h) override {
    CHECK(h.rows == x.cols && h.cols == x.cols);
    const double* there = send(x, a_);
    double* const sum = send(h, c_);
    add_moment(libraries_.blas, there, x.rows, x.cols, sum);
    fetch(stream_, sum, h);
  }

  std::unique_ptr<Moment> make_moment(int64_t d, Precision) override {
    return std::make_unique<CudaMoment>(stream_, row_, libraries_.blas, wide_, d);
  }

  void eigenvectors(Matrix& h) override {
    const int64_t n = h.rows;
    double* const a = send(h, a_);
    double* const values = static_cast<double*>(b_.at_least(n * kDouble));
    size_t device = 0, host = 0;
    check(cusolverDnXsyevd_bufferSize(libraries_.solver, libraries_.parameters, CUSOLVER_EIG_MODE_VECTOR,
                                      kUpper, n, CUDA_R_64F, a, n, CUDA_R_64F, values, CUDA_R_64F, &device,
                                      &host),
          "syevd");
    const Room room = make_room(device, host);
    check(cusolverDnXsyevd(libraries_.solver, libraries_.parameters, CUSOLVER_EIG_MODE_VECTOR, kUpper, n,
                           CUDA_R_64F, a, n, CUDA_R_64F, values, CUDA_R_64F, room.device, device, room.host,
                           host, room.info),
          "syevd");
    const int info = read_info();
    if (info == 0) fetch(stream_, a, h);
    if (info != 0 || !is_finite(h))
      fail("calibration: the eigenvectors did not converge (cuSOLVER syevd ", info, ")");
  }

  void invert_factor(Matrix& m) override {
    const int64_t n = m.rows;
    double* const a = send(m, a_);
    size_t device = 0, host = 0;
    check(cusolverDnXpotrf_bufferSize(libraries_.solver, libraries_.parameters, kLower, n, CUDA_R_64F, a, n,
                                      CUDA_R_64F, &device, &host),
          "potrf");
    Room room = make_room(device, host);
    check(cusolverDnXpotrf(libraries_.solver, libraries_.parameters, kLower, n, CUDA_R_64F, a, n, CUDA_R_64F,
                           room.device, device, room.host, host, room.info),
          "potrf");
    int info = read_info();
    if (info == 0) {
      check(cusolverDnXtrtri_bufferSize(libraries_.solver, kLower, CUBLAS_DIAG_NON_UNIT, n, CUDA_R_64F, a, n,
                                        &device, &host),
            "trtri");
      room = make_room(device, host);
      check(cusolverDnXtrtri(libraries_.solver, kLower, CUBLAS_DIAG_NON_UNIT, n, CUDA_R_64F, a, n,
                             room.device, device, room.host, host, room.info),
            "trtri");
      info = read_info();
    }
    if (info == 0) fetch(stream_, a, m);
    if (info != 0 || !is_inverse_factor(m))
      fail("rounding: the inputs' moments have no factor (cuSOLVER ", info, "), are they finite?");
  }

 private:
  /// What a solver works in.
  struct Room {
    void* device;
    void* host;
    int* info;
  };
  Room make_room(size_t device, size_t host) {
    host_room_.resize(host);
    return {room_.at_least(static_cast<int64_t>(device)), host_room_.data(),
            static_cast<int*>(info_.at_least(sizeof(int)))};
  }
  int read_info() {
    int info = 0;
    check(cudaMemcpyAsync(&info, info_.get<void>(), sizeof(info), cudaMemcpyDeviceToHost, stream_.stream),
          "copy");
    check(cudaStreamSynchronize(stream_.stream), "solver");
    return info;
  }

  double* send(const Matrix& m, Buffer& to) {
    const int64_t bytes = m.rows * m.cols * kDouble;
    void* const there = to.at_least(bytes);
    check(cudaMemcpyAsync(there, m.data.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                          stream_.stream),
          "copy");
    return static_cast<double*>(there);
  }

  /// C (M, N) = op(A) B, to the library Cᵀ = Bᵀ op(A)ᵀ.
  Matrix product(const Matrix& a, const Matrix& b, bool transposes) {
    const int64_t m = transposes ? a.cols : a.rows, k = transposes ? a.rows : a.cols, n = b.cols;
    CHECK(k == b.rows);
    Matrix c(m, n);
    const double* const left = send(a, a_);
    const double* const right = send(b, b_);
    auto* const to = static_cast<double*>(c_.at_least(m * n * kDouble));
    const double one = 1, zero = 0;
    check(cublasDgemm(libraries_.blas, CUBLAS_OP_N, transposes ? CUBLAS_OP_T : CUBLAS_OP_N, blas_int(n),
                      blas_int(m), blas_int(k), &one, right, blas_int(n), left, blas_int(a.cols), &zero, to,
                      blas_int(n)),
          "gemm");
    fetch(stream_, to, c);
    return c;
  }

  const Stream& stream_;
  OneRow& row_;
  const Libraries libraries_;
  Buffer a_, b_, c_, wide_, room_, info_;
  std::vector<char> host_room_;
};

}  // namespace

std::unique_ptr<Algebra> make_algebra(const Stream& stream, OneRow& row) {
  return std::make_unique<CudaAlgebra>(stream, row);
}

}  // namespace larosa::cuda
