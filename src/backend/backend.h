// The only door between the model and the machine. Each operation's formula stands here once; `ref` says what
// it means, `cpu` (and other machines) how to do it fast.
//
// Letters: T tokens (rows), D inputs, N outputs, H query heads, G key/value heads, E head width.
// All activations are float32 rows (Mat); weights are stored types (Weight). Rows of a Mat may be strided.
// Whatever an operation reads or writes is backend memory: the host's, unless the backend has memory of its
// own. Kernels throw nothing; shapes are the caller's duty (CHECK). Operations are issued from one thread.
// Results do not depend on the number of threads, bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>

#include "base/types.h"

namespace larosa {

class Algebra;
class ThreadPool;

/// Which entries of each row were kept, with their values. Only the backend that made it can read it.
class Selection {
 public:
  virtual ~Selection() = default;
};

/// Keys and values of one timeline, for all layers. Only the backend that made it can read it.
class KvCache {
 public:
  virtual ~KvCache() = default;
  /// Bytes of one token over all layers (for reports).
  virtual int64_t bytes_per_token() const = 0;
};

/// Element types of a cache. int8: the levels q = nearest(x · (127 / m)) of one head's key or value of one
/// position and the scale m / 127, m its largest |x|; a stored element is scale · q. All in float32; m below
/// 2⁻¹⁰⁰ counts as zero, and where m is not finite every element is NaN.
inline constexpr DType kKvTypes[] = {DType::f32, DType::f16, DType::int8};

/// Bytes of one head's key or value of one position: E elements, with int8 also the float32 scale.
constexpr int64_t kv_bytes(DType dtype, int64_t head_dim) {
  return dtype == DType::int8 ? head_dim + 4 : head_dim * dtype_size(dtype);
}

struct KvShape {
  int64_t layers = 0, kv_heads = 0, head_dim = 0, capacity = 0;  // capacity: tokens
  DType dtype = DType::f32;                                      // one of kKvTypes

  /// Bytes of one token over all layers.
  int64_t bytes_per_token() const { return 2 * layers * kv_heads * kv_bytes(dtype, head_dim); }
};

/// One output of a product: y (T, N) = x Wᵀ + bias, or += when accumulate is set.
struct Product {
  Weight weight;
  Mat y;
  bool accumulate = false;
};

/// An entry of a row of logits.
struct Candidate {
  float logit = 0;
  int32_t id = 0;

  /// What the logit counts as: a NaN as the least, infinities as the ends of the range. Order and differences
  /// are then defined whatever a broken model says.
  float finite() const {
    constexpr float kEnd = std::numeric_limits<float>::max();
    return logit > -kEnd ? std::min(logit, kEnd) : -kEnd;
  }
  /// Of two that are finite: the larger one is first, among equals the lower id, the same everywhere.
  bool above(const Candidate& other) const {
    return logit != other.logit ? logit > other.logit : id < other.id;
  }
  /// Of any two, by what they count as.
  bool before(const Candidate& other) const {
    return Candidate{finite(), id}.above({other.finite(), other.id});
  }
};

/// Arithmetic of dense products over many rows. Decoding (one row) and rotate are float32 either way.
enum class Products { f32, bf16 };

class Backend {
 public:
  virtual ~Backend() = default;

  /// One line for logs: "cpu, 2 threads, AVX3, products float32 (oneDNN)".
  virtual std::string describe() const = 0;
  /// Name of the arithmetic that dense products over many rows use, for outputs: "float32", "bf16".
  virtual std::string products_name() const = 0;

  // -- memory ------------------------------------------------------------------------------------------
  /// Memory for Mats, uninitialised. The backend must outlive it. Throws Error when there is not enough.
  virtual std::shared_ptr<void> allocate(int64_t bytes);
  /// The same bytes where operations read them: `data` itself in host memory, which must then live on.
  virtual std::shared_ptr<const void> upload(const void* data, int64_t bytes);
  /// Copies (rows, cols) to or from the host's dense rows, after everything issued before.
  virtual void read(Mat from, float* to);
  virtual void write(const float* from, Mat to);
  /// to = from, both (rows, cols) in the backend's memory.
  virtual void copy(Mat from, Mat to);
  /// Waits for everything issued before.
  virtual void synchronize() {}
  /// GB/s that memory gives for `bytes` well beyond the caches: what decoding is measured against. Host
  /// memory is read, memory of a backend's own is copied (bytes read and written), 1 GiB or more. Takes twice
  /// what it copies.
  virtual double measure_bandwidth(int64_t bytes) = 0;
  /// A selection for up to max_rows rows of max_cols entries.
  virtual std::unique_ptr<Selection> make_selection(int64_t max_rows, int64_t max_cols) = 0;
  /// An empty cache. Memory is taken as the timeline grows, not all at once.
  virtual std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) = 0;
  /// What calibration computes with (backend/algebra.h), on rows in this backend's memory. The backend and
  /// the pool must outlive it.
  virtual std::unique_ptr<Algebra> make_algebra(ThreadPool& pool);

  // -- operations --------------------------------------------------------------------------------------
  /// x[t] = table[tokens[t]].                                  table (V, D) rows; tokens (T); x (T, D)
  virtual void embed(const Weight& table, std::span<const int32_t> tokens, Mat x) = 0;

  /// y[t,i] = x[t,i] / sqrt(mean_i x[t,i]² + eps) · gain[i].   x, y (T, D), may alias; gain (D) or null
  /// (ones). RMSNorm, arXiv 1910.07467 eq. 4.
  virtual void rms_norm(Mat x, const float* gain, float eps, Mat y) = 0;

  /// For every product: y = x Wᵀ (+ bias) (+ y).               x (T, D); y (T, N); x aliases no y
  /// W is finite: where x is zero it may not be read.
  virtual void matmul(Mat x, std::span<const Product> products) = 0;

  /// y = x R (+ y), a change of basis of the stream or of an activation, in float32 whatever Products says.
  /// x (T, D), y (T, N), no alias; R (D, N) channels (rows: R transposed); N = D but for parts of a basis
  virtual void rotate(Mat x, const Weight& basis, Mat y, bool accumulate = false) = 0;

  /// Keeps, in every row, the `keep` entries of largest |x[t,i]|·scale[i]; among equals the lower index.
  /// Exactly keep entries, whatever the values; a NaN counts as largest.   x (T, D); scale (D) ≥ 0 or null;
  /// 0 ≤ keep ≤ D
  /// LaRoSA, arXiv 2507.01299 §4.2; scale: WINA, arXiv 2505.19427 eq. 4.
  virtual void topk(Mat x, const float* scale, int64_t keep, Selection& kept) = 0;

  /// Keeps the entries with |x[t,i]|·scale[i] > cut, and NaN.   x (T, D); scale (D) ≥ 0 or null
  /// TEAL, arXiv 2408.14690 eq. 1.
  virtual void threshold(Mat x, const float* scale, float cut, Selection& kept) = 0;

  /// matmul of the rows with everything that was not kept set to zero. With T = 1 and weights in `channels`
  /// layout the dropped channels are not read.  Equals matmul of expand(kept) bit for bit on channels
  /// layout, for finite weights (a dropped channel with an infinity or NaN is not read).
  virtual void sparse_matmul(const Selection& kept, std::span<const Product> products) = 0;

  /// y = the rows with zeros where nothing was kept; a kept −0 may become +0.  y (T, D)
  virtual void expand(const Selection& kept, Mat y) = 0;

  /// The complement: y = x with zeros where something was kept.   x, y (T, D), x what `kept` was chosen from;
  /// may alias
  virtual void expand_dropped(const Selection& kept, Mat x, Mat y) = 0;

  /// The outputs of a product whose entries in `kept` (T, N) are not zero: there y as matmul gives it, bit
  /// for bit; zero elsewhere. With T = 1 and weights in `rows` layout the other outputs' weights are not
  /// read. x (T, D); product without accumulate; x aliases not y
  virtual void matmul_outputs(Mat x, const Selection& kept, const Product& product) = 0;

  /// Number of kept entries, all rows together.
  virtual int64_t count(const Selection& kept) = 0;

  /// Rotary position embedding of positions pos … pos + T − 1 in place, halves paired (i, i + E/2), arXiv
  /// 2104.09864 eq. 34: angle = position · inv_freq[i].     q (T, H·E); k (T, G·E); inv_freq (E/2), one table
  /// per address
  virtual void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) = 0;

  /// Appends k, v at positions pos … pos + T − 1 of `layer`, then causal attention of q over the cache:
  /// out[t,h] = Σ_j softmax_j(q[t,h]·k[j,g(h)] / √E) v[j,g(h)], j from max(0, p − window + 1) to p = pos + t
  /// (window 0: from 0), g(h) = h / (H/G).   q, out (T, H·E), no alias; k, v (T, G·E); pos + T ≤ capacity.
  /// q and k hold nothing of use afterwards.
  virtual void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
                      Mat out) = 0;

  /// y = a(z).                                                 z, y (T, D), may alias
  virtual void activate(Mat z, const Activation& activation, Mat y) = 0;

  /// mid = a(gate) · up (dReLU: · max(0, up)), a as `activate` computes it.   all (T, D); mid may alias gate
  /// or up
  virtual void glu(Mat gate, Mat up, const Activation& activation, Mat mid) = 0;

  /// Every row to log-probabilities: x[t,i] −= log Σ_j e^{x[t,j]}.   x (T, V), in place
  virtual void log_softmax(Mat x) = 0;

  /// The to.size() largest entries of a row as they are, in the order of Candidate::before. After everything
  /// issued before; `to` is the host's and filled on return.   x (1, V); 1 ≤ to.size() ≤ V
  virtual void largest(Mat x, std::span<Candidate> to);
};

/// The meaning of every operation: plain loops, double sums, no speed.
std::unique_ptr<Backend> make_ref_backend();

struct CpuOptions {
  Products products = Products::f32;  // arithmetic of dense products over many rows
};

/// The fast CPU backend: Highway kernels with run-time dispatch, oneDNN for many rows. The environment
/// variable LAROSA_ISA (portable, avx2, avx512, avx512vnni, zen5, intel; neon on Arm) forces an instruction
/// set; an unknown or unsupported one throws Error.
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options, ThreadPool& pool);

struct CudaOptions {
  int device = 0;  // as `cuda_devices` numbers them
  Products products = Products::f32;
};

/// The backend for NVIDIA devices of compute capability 8.0 on. Throws Error where there is none, or in a
/// build without CUDA.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

/// The backend that flags ask for. device: "cpu", "cuda" or "cuda:I"; backend: "cpu" or "ref" (on the cpu);
/// products: "f32" or "bf16". Throws Error naming the one that is wrong.
std::unique_ptr<Backend> make_backend(const std::string& device, const std::string& backend,
                                      const std::string& products, ThreadPool& pool);

}  // namespace larosa
