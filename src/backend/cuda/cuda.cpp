// The CUDA backend: rows by the many here, one row (decoding) through OneRow. Whatever else happens first
// launches what waits there.
#include <algorithm>
#include <memory>
#include <sstream>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/algebra.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/one_row.h"
#include "backend/cuda/storage.h"
#include "base/error.h"

namespace larosa {
namespace cuda {

namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& options)
      : products_(options.products), stream_(make_stream(options.device)), matmul_(stream_), row_(stream_) {}
  ~CudaBackend() override { cudaStreamDestroy(stream_.stream); }

  std::string describe() const override {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, stream_.device), "device");
    std::ostringstream text;
    text << "cuda:" << stream_.device << ", " << properties.name << ", " << stream_.multiprocessors
         << " multiprocessors, products " << products_name() << " (cuBLASLt)";
    return text.str();
  }
  std::string products_name() const override { return products_ == Products::bf16 ? "bf16" : "float32"; }

  std::shared_ptr<void> allocate(int64_t bytes) override {
    angles_pos_ = -1;  // a table of frequencies may come to stand where an old one stood
    return {allocate_device(bytes), [this](void* data) {
              try {
                row_.flush();  // what waits may read it
              } catch (const Error&) {
                // The device has failed, which the next call that waits for it says.
              }
              cudaFree(data);
            }};
  }
  std::shared_ptr<const void> upload(const void* data, int64_t bytes) override {
    const std::shared_ptr<void> to = allocate(bytes);
    check(cudaMemcpyAsync(to.get(), data, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_.stream),
          "copy");
    check(cudaStreamSynchronize(stream_.stream), "copy");
    return to;
  }
  void read(Mat from, float* to) override {
    flush();
    copy(to, from.cols, from.data, from.stride, from.rows, from.cols, cudaMemcpyDeviceToHost);
    synchronize();
  }
  void write(const float* from, Mat to) override {
    flush();
    copy(to.data, to.stride, from, to.cols, to.rows, to.cols, cudaMemcpyHostToDevice);
    synchronize();
  }
  void copy(Mat from, Mat to) override {
    flush();
    copy(to.data, to.stride, from.data, from.stride, from.rows, from.cols, cudaMemcpyDeviceToDevice);
  }
  void synchronize() override {
    flush();
    check(cudaStreamSynchronize(stream_.stream), "kernel");
  }
  double measure_bandwidth(int64_t bytes) override {
    flush();
    return copy_bandwidth(stream_.stream, bytes);
  }

  std::unique_ptr<Selection> make_selection(int64_t rows, int64_t cols) override {
    return std::make_unique<CudaSelection>(rows, cols);
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) override {
    CHECK(std::ranges::count(kKvTypes, shape.dtype) == 1);
    if (shape.head_dim > kWidestHead)
      fail("cuda: heads of ", shape.head_dim, " entries are not supported, expected at most ", kWidestHead);
    return std::make_unique<CudaKvCache>(shape);
  }

  std::unique_ptr<Algebra> make_algebra(ThreadPool&) override { return cuda::make_algebra(stream_, row_); }

  void embed(const Weight& table, std::span<const int32_t> tokens, Mat x) override {
    CHECK(table.layout == Layout::rows && x.cols == table.in &&
          x.rows == static_cast<int64_t>(tokens.size()));
    for (int32_t token : tokens) CHECK(token >= 0 && token < table.out);
    flush();
    if (tokens.size() == 1) return cuda::embed(stream_, table, nullptr, tokens[0], x);
    auto* const ids = static_cast<int32_t*>(tokens_.at_least(x.rows * 4));
    check(cudaMemcpyAsync(ids, tokens.data(), tokens.size_bytes(), cudaMemcpyHostToDevice, stream_.stream),
          "copy");
    cuda::embed(stream_, table, ids, 0, x);
  }

  void rms_norm(Mat x, const float* gain, float eps, Mat y) override {
    CHECK(x.rows == y.rows && x.cols == y.cols);
    if (x.rows == 1 && (x.data + x.cols <= y.data || y.data + y.cols <= x.data))
      return row_.rms_norm(x, gain, eps, y);
    flush();
    cuda::rms_norm(stream_, x, gain, eps, y);
  }

  void matmul(Mat x, std::span<const Product> products) override { multiply(x, products, products_); }

  /// Always float32: the stream passes here once per layer, and bf16 would round it each time.
  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate) override {
    if (x.rows == 1) return row_.rotate(x, basis, y, accumulate);
    const Product product{basis, y, accumulate};
    multiply(x, std::span(&product, 1), Products::f32);
  }

  void topk(Mat x, const float* scale, int64_t keep, Selection& kept) override {
    CHECK(keep >= 0 && keep <= x.cols);
    Input rule;
    rule.select = Selects::topk;
    rule.keep = static_cast<int>(keep);
    rule.scale = scale;
    select(x, rule, static_cast<CudaSelection&>(kept));
  }
  void threshold(Mat x, const float* scale, float cut, Selection& kept) override {
    Input rule;
    rule.select = Selects::threshold;
    rule.cut = cut;
    rule.scale = scale;
    select(x, rule, static_cast<CudaSelection&>(kept));
  }

  void sparse_matmul(const Selection& kept, std::span<const Product> products) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    if (s.rows > 1) return matmul(s.mat(), products);
    row_.multiply_kept(s, products);
  }

  void expand(const Selection& kept, Mat y) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols);
    flush();
    copy(y.data, y.stride, s.mat().data, y.cols, y.rows, y.cols, cudaMemcpyDeviceToDevice);
  }

  void expand_dropped(const Selection& kept, Mat x, Mat y) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols && x.rows == y.rows && x.cols == y.cols);
    flush();
    mask(stream_, s.mat(), false, x, y);
  }

  void matmul_outputs(Mat x, const Selection& kept, const Product& p) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == p.y.rows && s.cols == p.y.cols && x.cols == p.weight.in && !p.accumulate);
    flush();
    if (x.rows == 1 && p.weight.layout == Layout::rows) return row_.multiply_outputs(x, s, p);
    matmul(x, std::span(&p, 1));
    flush();
    mask(stream_, s.mat(), true, p.y, p.y);
  }

  int64_t count(const Selection& kept) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    flush();
    std::vector<int32_t> counts(static_cast<size_t>(s.rows));
    check(cudaMemcpyAsync(counts.data(), s.kept(), counts.size() * 4, cudaMemcpyDeviceToHost, stream_.stream),
          "copy");
    synchronize();
    int64_t total = 0;
    for (int32_t n : counts) total += n;
    return total;
  }

  void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) override {
    CHECK(q.rows == k.rows && q.cols % head_dim == 0 && k.cols % head_dim == 0 && head_dim % 2 == 0);
    prepare_angles(pos, q.rows, head_dim / 2, inv_freq);
    if (q.rows == 1) return row_.rope(q, k, head_dim, angles_);
    flush();
    cuda::rope(stream_, q, k, head_dim, angles_);
  }

  void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
              Mat out) override {
    const CudaKvCache& kv = static_cast<CudaKvCache&>(cache);
    CHECK(pos >= 0 && pos + q.rows <= kv.shape.capacity && layer >= 0 && layer < kv.shape.layers);
    if (q.rows == 1) return row_.attend(q, k, v, kv.layer(layer), pos, window, out);
    flush();
    cuda::attend(stream_, q, k, v, kv.layer(layer), pos, window, out);
  }

  void activate(Mat z, const Activation& activation, Mat y) override {
    CHECK(z.rows == y.rows && z.cols == y.cols);
    flush();
    cuda::activate(stream_, z, activation, y);
  }

  void glu(Mat gate, Mat up, const Activation& activation, Mat mid) override {
    CHECK(gate.rows == up.rows && gate.cols == up.cols && gate.rows == mid.rows && gate.cols == mid.cols);
    if (gate.rows == 1) return row_.glu(gate, up, activation, mid);
    flush();
    cuda::glu(stream_, gate, up, activation, mid);
  }

  void log_softmax(Mat x) override {
    flush();
    cuda::log_softmax(stream_, x);
  }

  void largest(Mat x, std::span<Candidate> to) override {
    CHECK(x.rows == 1 && !to.empty() && static_cast<int64_t>(to.size()) <= x.cols);
    if (!finds_largest(x.cols, static_cast<int64_t>(to.size()))) {
      std::vector<float> row(static_cast<size_t>(x.cols));
      read(x, row.data());
      return Backend::largest(Mat(row.data(), 1, x.cols), to);
    }
    flush();
    const auto entries = [](void* memory, int most) {
      auto* const values = static_cast<float*>(memory);
      return Entries{values, reinterpret_cast<int32_t*>(values + most)};
    };
    constexpr int kMost = kStretches * kMostLargest;
    const Entries found = entries(found_.get<void>(), kMostLargest);
    cuda::largest(stream_, x, static_cast<int>(to.size()), entries(stretches_.at_least(kMost * 8), kMost),
                  found);
    synchronize();
    for (size_t i = 0; i < to.size(); ++i) to[i] = {found.value[i], found.id[i]};
  }

 private:
  void flush() { row_.flush(); }

  void multiply(Mat x, std::span<const Product> products, Products arithmetic) {
    if (x.rows == 1) return row_.multiply(x, products);
    flush();
    for (const Product& p : products) matmul_.run(x, p, arithmetic);
  }

  void select(Mat x, const Input& rule, CudaSelection& kept) {
    kept.reset(x.rows, x.cols);
    if (x.rows == 1) return row_.select(x, rule, kept);
    flush();
    cuda::select(stream_, x, rule, kept.mat().data, kept.kept());
  }

  void copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t cols,
            cudaMemcpyKind kind) {
    const auto bytes = [](int64_t n) { return static_cast<size_t>(n) * sizeof(float); };
    if (rows == 0 || cols == 0) return;
    check(cudaMemcpy2DAsync(to, bytes(to_stride), from, bytes(from_stride), bytes(cols),
                            static_cast<size_t>(rows), kind, stream_.stream),
          "copy");
  }

  /// Layers ask for the same positions one after another: the angles are kept.
  void prepare_angles(int64_t pos, int64_t rows, int64_t half, const float* inv_freq) {
    if (angles_pos_ == pos && angles_rows_ >= rows && angles_half_ == half && inv_freq_ == inv_freq) return;
    flush();
    angles_.cosine = static_cast<float*>(cosine_.at_least(rows * half * 4));
    angles_.sine = static_cast<float*>(sine_.at_least(rows * half * 4));
    cuda::angles(stream_, pos, rows, half, inv_freq, angles_);
    angles_pos_ = pos;
    angles_rows_ = rows;
    angles_half_ = half;
    inv_freq_ = inv_freq;
  }

  const Products products_;
  const Stream stream_;
  Matmul matmul_;
  OneRow row_;
  Buffer tokens_, cosine_, sine_, stretches_;
  const HostMemory found_{kMostLargest * 8};
  Angles angles_;
  int64_t angles_pos_ = -1, angles_rows_ = 0, angles_half_ = 0;
  const float* inv_freq_ = nullptr;
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<cuda::CudaBackend>(options);
}

}  // namespace larosa
