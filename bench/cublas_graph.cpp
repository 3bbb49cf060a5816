#include "cublas_graph.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "backend/cuda/kernels.h"
#include "base/error.h"

namespace larosa {
namespace {

using cuda::check;

constexpr size_t kWorkspace = size_t{64} << 20;
constexpr int kAlgorithms = 8;  // of cublasLt, for each layout

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) fail(call, ": ", cublasGetStatusString(status));
}

/// What cublasLt wants to know of a product of one column, y (out) = W x (in).
class LtProduct {
 public:
  LtProduct(const DenseProduct& p, bool rows) {
    const cublasOperation_t turned = rows ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(cublasLtMatmulDescCreate(operation.out(), CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
    check(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof(turned)),
          "cublasLtMatmulDescSetAttribute");
    const int64_t lines = rows ? p.in : p.out, columns = rows ? p.out : p.in;
    make(weight, lines, columns);
    make(x, p.in, 1);
    make(y, p.out, 1);
  }

  using Layout = cuda::Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
  cuda::Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation;
  Layout weight, x, y;

 private:
  static void make(Layout& layout, int64_t lines, int64_t columns) {
    check(cublasLtMatrixLayoutCreate(layout.out(), CUDA_R_16BF, static_cast<uint64_t>(lines),
                                     static_cast<uint64_t>(columns), lines),
          "cublasLtMatrixLayoutCreate");
  }
};

/// Records what is issued on a stream while it lives. An error on the way ends the recording too.
class Recording {
 public:
  explicit Recording(cudaStream_t stream) : stream_(stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  }
  ~Recording() {
    if (!ended_ && cudaStreamEndCapture(stream_, &graph_) != cudaSuccess) cudaGetLastError();
    if (graph_) cudaGraphDestroy(graph_);
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  std::unique_ptr<Graph> end() {
    ended_ = true;
    check(cudaStreamEndCapture(stream_, &graph_), "cudaStreamEndCapture");
    cudaGraphExec_t exec = nullptr;
    check(cudaGraphInstantiate(&exec, graph_, 0), "cudaGraphInstantiate");
    return std::make_unique<Graph>(exec, stream_);
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  bool ended_ = false;
};

}  // namespace

double Graph::median_ms(int times) const {
  cuda::Handle<cudaEvent_t, cudaEventDestroy> start, stop;
  check(cudaEventCreate(start.out()), "cudaEventCreate");
  check(cudaEventCreate(stop.out()), "cudaEventCreate");
  std::vector<float> ms(static_cast<size_t>(times));
  for (float& t : ms) {
    check(cudaEventRecord(start, stream_), "cudaEventRecord");
    check(cudaGraphLaunch(exec_, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(stop, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize after cudaGraphLaunch");
    check(cudaEventElapsedTime(&t, start, stop), "cudaEventElapsedTime");
  }
  std::nth_element(ms.begin(), ms.begin() + times / 2, ms.end());
  return static_cast<double>(ms[static_cast<size_t>(times / 2)]);
}

Cublas::Cublas(int64_t widest) {
  check(cudaStreamCreateWithFlags(stream_.out(), cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  check(cublasCreate(handle_.out()), "cublasCreate");
  check(cublasSetStream(handle_, stream_), "cublasSetStream");
  // After the stream, which takes the library's own; and a recording must not allocate.
  check(cublasSetWorkspace(handle_, workspace_.at_least(kWorkspace), kWorkspace), "cublasSetWorkspace");
  check(cublasLtCreate(lt_.out()), "cublasLtCreate");
  std::mt19937 random(1);
  std::vector<uint16_t> row(static_cast<size_t>(widest));
  for (uint16_t& v : row) v = static_cast<uint16_t>((random() & 0x807f) | 0x3f80);  // ±[1, 2) in bf16
  check(cudaMemcpy(x_.at_least(widest * 2), row.data(), row.size() * 2, cudaMemcpyHostToDevice),
        "cudaMemcpy");
  y_.at_least(widest * 2);
}

void Cublas::multiply(const DenseProduct& p, const CublasWay& way) {
  const float one = 1, zero = 0;
  if (way.lt) {
    const LtProduct lt(p, way.rows);
    check(cublasLtMatmul(lt_, lt.operation, &one, p.weight, lt.weight, x_.get<void>(), lt.x, &zero,
                         y_.get<void>(), lt.y, y_.get<void>(), lt.y, &way.algo, workspace_.get<void>(),
                         kWorkspace, stream_),
          "cublasLtMatmul");
    return;
  }
  const int in = static_cast<int>(p.in), out = static_cast<int>(p.out);
  check(cublasGemmEx(handle_, way.rows ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, out, 1, in, &one, p.weight,
                     CUDA_R_16BF, way.rows ? in : out, x_.get<void>(), CUDA_R_16BF, in, &zero, y_.get<void>(),
                     CUDA_R_16BF, out, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
}

/// Everything that cuBLAS offers for a shape, in the order of its own preference.
std::vector<CublasWay> Cublas::ways(const DenseProduct& p) {
  std::vector<CublasWay> all;
  for (const bool rows : {true, false}) {
    const std::string layout = rows ? "rows" : "channels";
    all.push_back({rows, false, {}, "cublasGemmEx, " + layout});
    const LtProduct lt(p, rows);
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    cublasLtMatmulHeuristicResult_t found[kAlgorithms]{};
    int count = 0;
    const cublasStatus_t set = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof(kWorkspace));
    const cublasStatus_t asked = cublasLtMatmulAlgoGetHeuristic(lt_, lt.operation, lt.weight, lt.x, lt.y,
                                                                lt.y, preference, kAlgorithms, found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    check(set, "cublasLtMatmulPreferenceSetAttribute");
    if (asked == CUBLAS_STATUS_NOT_SUPPORTED) continue;
    check(asked, "cublasLtMatmulAlgoGetHeuristic");
    for (int i = 0; i < count; ++i) {
      if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
      all.push_back({rows, true, found[i].algo, "cublasLt " + std::to_string(i) + ", " + layout});
    }
  }
  return all;
}

const CublasWay& Cublas::fastest(std::span<const DenseProduct> products) {
  const auto [place, fresh] = fastest_.try_emplace({products[0].in, products[0].out});
  CublasWay& best = place->second;
  if (!fresh) return best;
  for (CublasWay& way : ways(products[0])) {
    try {
      multiply(products[0], way);  // loads its code, which a recording may not
      check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize after a product of cuBLAS");
      const std::unique_ptr<Graph> graph = record(products, &way);
      graph->median_ms(2);
      way.us = 1e3 * graph->median_ms(9) / static_cast<double>(products.size());
      if (best.us == 0 || way.us < best.us) best = way;
    } catch (const Error& e) {
      std::fprintf(stderr, "cuda_bench: %s, %ld x %ld, left out: %s\n", way.name.c_str(),
                   static_cast<long>(products[0].in), static_cast<long>(products[0].out), e.what());
    }
  }
  if (best.us > 0) return best;
  fastest_.erase(place);
  fail("cuBLAS has no product of ", products[0].in, " x ", products[0].out);
}

std::unique_ptr<Graph> Cublas::record(std::span<const DenseProduct> products, const CublasWay* way) {
  Recording recording(stream_);
  for (const DenseProduct& p : products) multiply(p, way ? *way : fastest_.at({p.in, p.out}));
  return recording.end();
}
std::unique_ptr<Graph> Cublas::record(std::span<const DenseProduct> products) {
  return record(products, nullptr);
}

}  // namespace larosa
