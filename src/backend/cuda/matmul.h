// Products over many rows: cuBLASLt, from weights of either layout and any stored type.
#pragma once

#include <cublasLt.h>

#include "backend/cuda/kernels.h"
#include "backend/cuda/memory.h"

namespace larosa::cuda {

class Matmul {
 public:
  explicit Matmul(const Stream& stream);
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  /// y = x Wᵀ (+ bias) (+ y). f32: weights widened. bf16: activations (and other types' weights) rounded.
  /// Both add up in float32.
  void run(Mat x, const Product& product, Products arithmetic);

 private:
  struct Operand {
    const void* data;
    int64_t pitch;  // elements of a line
  };
  Operand weight(const Weight& w, int64_t first, int64_t count, bool bf16);
  void multiply(const Operand& w, Layout layout, const Operand& x, Mat y, int64_t in, bool bf16, bool add);

  const Stream& stream_;
  cublasLtHandle_t handle_ = nullptr;
  Buffer workspace_, weight_, rows_;
};

}  // namespace larosa::cuda
