// Dense products of one row as cuBLAS does them, all in one CUDA graph: what the backend's are compared with.
// bf16 weights and rows, float32 sums.
#pragma once

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/handle.h"
#include "backend/cuda/memory.h"

namespace larosa {

/// y (out) = W x (in). Weights of in · out elements in device memory; how they lie is for cuBLAS to choose.
struct DenseProduct {
  const void* weight = nullptr;
  int64_t in = 0, out = 0;

  int64_t bytes() const { return in * out * 2; }
};

/// Launches that were recorded, to be replayed.
class Graph {
 public:
  Graph(cudaGraphExec_t exec, cudaStream_t stream) : exec_(exec), stream_(stream) {}
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  /// Median of `times` replays, each between two events.
  double median_ms(int times) const;

 private:
  cudaGraphExec_t exec_;
  cudaStream_t stream_;
};

/// How cuBLAS multiplies a shape the fastest: cublasGemmEx or one of cublasLt's algorithms, on weights that
/// lie by outputs ("rows") or by inputs ("channels").
struct CublasWay {
  bool rows = true, lt = false;
  cublasLtMatmulAlgo_t algo{};
  std::string name;
  double us = 0;  // of one product, in a graph of all weights of the shape
};

/// cuBLAS on a stream of its own. Throws Error naming the call that failed.
class Cublas {
 public:
  /// Rows of up to `widest` entries.
  explicit Cublas(int64_t widest);

  /// The fastest way for products of one shape, timed over all of them. Ways that cuBLAS refuses are left
  /// out.
  const CublasWay& fastest(std::span<const DenseProduct> products);
  /// The products one after another, each in the way found before for its shape.
  std::unique_ptr<Graph> record(std::span<const DenseProduct> products);

 private:
  std::vector<CublasWay> ways(const DenseProduct& product);
  std::unique_ptr<Graph> record(std::span<const DenseProduct> products, const CublasWay* way);
  void multiply(const DenseProduct& product, const CublasWay& way);

  cuda::Buffer workspace_, x_, y_;  // freed after the handles that use them
  cuda::Handle<cudaStream_t, cudaStreamDestroy> stream_;
  cuda::Handle<cublasHandle_t, cublasDestroy> handle_;
  cuda::Handle<cublasLtHandle_t, cublasLtDestroy> lt_;
  std::map<std::pair<int64_t, int64_t>, CublasWay> fastest_;  // by (in, out)
};

}  // namespace larosa
