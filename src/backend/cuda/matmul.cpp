#include "backend/cuda/matmul.h"

#include <algorithm>

#include "base/error.h"

namespace larosa::cuda {
namespace {

constexpr int64_t kWorkspace = int64_t{32} << 20;
constexpr int64_t kMostWidened = int64_t{1} << 26;  // elements of a weight that are widened at once
constexpr int64_t kEven = 8;                        // lines of scratch operands are multiples of 16 bytes

void check(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuda: cublasLt: ", cublasLtGetStatusString(status));
}

/// A description that cublasLt makes and destroys.
template <class T, auto kDestroy>
struct Owned {
  T value = nullptr;
  Owned() = default;
  ~Owned() { kDestroy(value); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};
using Layout_ = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

int64_t padded(int64_t n) {
  return (n + kEven - 1) / kEven * kEven;
}

/// The largest power of two, up to 256, that address and line length are multiples of.
uint32_t alignment(const void* data, int64_t line_bytes) {
  uint32_t bytes = 256;
  while (reinterpret_cast<uintptr_t>(data) % bytes != 0 || line_bytes % bytes != 0) bytes /= 2;
  return bytes;
}

}  // namespace

Matmul::Matmul(const Stream& stream) : stream_(stream) {
  check(cublasLtCreate(&handle_));
  workspace_.at_least(kWorkspace);
}

Matmul::~Matmul() {
  cublasLtDestroy(handle_);
}

void Matmul::run(Mat x, const Product& product, Products arithmetic) {
  const Weight& w = product.weight;
  CHECK(x.cols == w.in && product.y.cols == w.out && product.y.rows == x.rows);
  const bool bf16 = arithmetic == Products::bf16;
  Operand rows{x.data, x.stride};
  if (bf16) {
    rows = {rows_.at_least(x.rows * padded(w.in) * 2), padded(w.in)};
    round_rows(stream_, x, rows.pitch, rows_.get<void>());
  }
  if (w.bias) start_rows(stream_, w.bias, product.accumulate, product.y);
  const int64_t most = std::clamp<int64_t>(kMostWidened / padded(w.in), 1, w.out);
  for (int64_t first = 0; first < w.out; first += most) {
    const int64_t count = std::min(most, w.out - first);
    const Mat y(product.y.data + first, x.rows, count, product.y.stride);
    multiply(weight(w, first, count, bf16), w.layout, rows, y, w.in, bf16, product.accumulate || w.bias);
  }
}

/// The outputs [first, first + count) of a weight as the library takes them: as they lie where they can.
Matmul::Operand Matmul::weight(const Weight& w, int64_t first, int64_t count, bool bf16) {
  if (w.dtype == (bf16 ? DType::bf16 : DType::f32)) {
    const int64_t line = w.line_length(), size = dtype_size(w.dtype);
    const char* data =
        static_cast<const char*>(w.data) + (w.layout == Layout::rows ? first * w.in : first) * size;
    if (!bf16 || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && line * size % 16 == 0)) return {data, line};
  }
  const int64_t pitch = padded(w.layout == Layout::rows ? w.in : count);
  const int64_t lines = w.layout == Layout::rows ? count : w.in;
  void* to = weight_.at_least(lines * pitch * (bf16 ? 2 : 4));
  widen_weight(stream_, w, first, count, bf16, pitch, to);
  return {to, pitch};
}

/// The library's matrices are column-major: yᵀ (N, T) = W (N, D) xᵀ (D, T).
void Matmul::multiply(const Operand& w, Layout layout, const Operand& x, Mat y, int64_t in, bool bf16,
                      bool add) {
  const cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const int64_t size = bf16 ? 2 : 4;
  const cublasOperation_t turned = layout == Layout::rows ? CUBLAS_OP_T : CUBLAS_OP_N;
  Operation operation;
  check(cublasLtMatmulDescCreate(&operation.value, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  check(
      cublasLtMatmulDescSetAttribute(operation.value, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof(turned)));
  Layout_ a, b, c;
  const int64_t lines = layout == Layout::rows ? in : y.cols, columns = layout == Layout::rows ? y.cols : in;
  const auto made = [](Layout_& m, cudaDataType_t t, int64_t rows, int64_t cols, int64_t pitch) {
    check(cublasLtMatrixLayoutCreate(&m.value, t, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols),
                                     pitch));
  };
  made(a, type, lines, columns, std::max(w.pitch, lines));
  made(b, type, in, y.rows, std::max(x.pitch, in));
  made(c, CUDA_R_32F, y.cols, y.rows, std::max(y.stride, y.cols));
  Preference preference;
  check(cublasLtMatmulPreferenceCreate(&preference.value));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference.value, what, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(w.data, w.pitch * size));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(x.data, x.pitch * size));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(y.data, y.stride * 4));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(y.data, y.stride * 4));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle_, operation.value, a.value, b.value, c.value, c.value,
                                       preference.value, 1, &found, &count));
  if (count == 0) fail("cuda: cublasLt has no product for ", y.rows, " x ", in, " x ", y.cols);
  const float one = 1, beta = add ? 1.0f : 0.0f;
  check(cublasLtMatmul(handle_, operation.value, &one, w.data, a.value, x.data, b.value, &beta, y.data,
                       c.value, y.data, c.value, &found.algo, workspace_.get<void>(),
                       static_cast<size_t>(kWorkspace), stream_.stream));
}

}  // namespace larosa::cuda
