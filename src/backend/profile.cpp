#include "backend/profile.h"

#include <algorithm>
#include <utility>

#include "backend/algebra.h"
#include "base/error.h"

namespace larosa {

std::string Profile::name_of(const char* operation, std::span<const void* const> tensors) const {
  std::string name = operation;
  for (const void* tensor : tensors) {
    if (const auto word = words_.find(tensor); word != words_.end()) name += " " + word->second;
  }
  return name;
}

void Profile::add(const std::string& name, int64_t bytes, std::chrono::steady_clock::duration time) {
  auto at = std::find_if(timings_.begin(), timings_.end(), [&](const Timing& t) { return t.name == name; });
  if (at == timings_.end()) at = timings_.insert(at, {name});
  ++at->calls;
  at->bytes += bytes;
  at->seconds += std::chrono::duration<double>(time).count();
}

std::vector<Timing> Profile::take() {
  return std::exchange(timings_, {});
}

namespace {

int64_t float_bytes(const float* values, int64_t n) {
  return values ? n * static_cast<int64_t>(sizeof(float)) : 0;
}

/// Bytes of `kept` of the inputs of every product.
int64_t product_bytes(std::span<const Product> products, int64_t kept) {
  int64_t bytes = 0;
  for (const Product& p : products)
    bytes += p.weight.bytes() * kept / p.weight.in + float_bytes(p.weight.bias, p.weight.out);
  return bytes;
}

/// An operation is a line or two: its name, the tensors that name it, the bytes it reads.
class ProfiledBackend final : public Backend {
 public:
  ProfiledBackend(Backend& inner, Profile& profile) : inner_(inner), profile_(profile) {}

  std::string describe() const override { return inner_.describe(); }
  std::string products_name() const override { return inner_.products_name(); }

  std::shared_ptr<void> allocate(int64_t bytes) override { return inner_.allocate(bytes); }
  std::shared_ptr<const void> upload(const void* data, int64_t bytes) override {
    return inner_.upload(data, bytes);
  }
  void read(Mat from, float* to) override { inner_.read(from, to); }
  void write(const float* from, Mat to) override { inner_.write(from, to); }
  void copy(Mat from, Mat to) override { inner_.copy(from, to); }
  void synchronize() override { inner_.synchronize(); }
  double measure_bandwidth(int64_t bytes) override { return inner_.measure_bandwidth(bytes); }

  std::unique_ptr<Selection> make_selection(int64_t max_rows, int64_t max_cols) override {
    return inner_.make_selection(max_rows, max_cols);
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) override {
    auto cache = inner_.make_kv_cache(shape);
    position_bytes_[cache.get()] = cache->bytes_per_token() / shape.layers;
    return cache;
  }
  std::unique_ptr<Algebra> make_algebra(ThreadPool& pool) override { return inner_.make_algebra(pool); }
  int64_t count(const Selection& kept) override { return inner_.count(kept); }

  void embed(const Weight& table, std::span<const int32_t> tokens, Mat x) override {
    time("embed", {}, table.bytes() / table.out * x.rows, [&] { inner_.embed(table, tokens, x); });
  }
  void rms_norm(Mat x, const float* gain, float eps, Mat y) override {
    time("rms_norm", {gain}, float_bytes(gain, x.cols), [&] { inner_.rms_norm(x, gain, eps, y); });
  }
  void matmul(Mat x, std::span<const Product> products) override {
    time("matmul", products, product_bytes(products, x.cols), [&] { inner_.matmul(x, products); });
  }
  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate) override {
    time("rotate", {basis.data}, basis.bytes(), [&] { inner_.rotate(x, basis, y, accumulate); });
  }
  void topk(Mat x, const float* scale, int64_t keep, Selection& kept) override {
    time("topk", {scale}, float_bytes(scale, x.cols), [&] { inner_.topk(x, scale, keep, kept); });
  }
  void threshold(Mat x, const float* scale, float cut, Selection& kept) override {
    time("threshold", {scale}, float_bytes(scale, x.cols), [&] { inner_.threshold(x, scale, cut, kept); });
  }
  void sparse_matmul(const Selection& kept, std::span<const Product> products) override {
    const Product& first = products[0];
    const bool skips = first.y.rows == 1 && first.weight.layout == Layout::channels;
    const int64_t bytes = product_bytes(products, skips ? inner_.count(kept) : first.weight.in);
    time("sparse_matmul", products, bytes, [&] { inner_.sparse_matmul(kept, products); });
  }
  void expand(const Selection& kept, Mat y) override {
    time("expand", {}, 0, [&] { inner_.expand(kept, y); });
  }
  void expand_dropped(const Selection& kept, Mat x, Mat y) override {
    time("expand_dropped", {}, 0, [&] { inner_.expand_dropped(kept, x, y); });
  }
  void matmul_outputs(Mat x, const Selection& kept, const Product& product) override {
    const Weight& w = product.weight;
    const bool skips = x.rows == 1 && w.layout == Layout::rows;
    const int64_t outputs = skips ? inner_.count(kept) : w.out;
    const int64_t bytes = w.bytes() * outputs / w.out + float_bytes(w.bias, outputs);
    time("matmul_outputs", {w.data}, bytes, [&] { inner_.matmul_outputs(x, kept, product); });
  }
  void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) override {
    time("rope", {}, float_bytes(inv_freq, head_dim / 2),
         [&] { inner_.rope(q, k, head_dim, pos, inv_freq); });
  }
  void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
              Mat out) override {
    const auto position = position_bytes_.find(&cache);
    CHECK(position != position_bytes_.end());
    const int64_t end = pos + q.rows, first = window > 0 ? std::max<int64_t>(0, pos - window + 1) : 0;
    time("attend", {}, (end - first) * position->second,
         [&] { inner_.attend(q, k, v, cache, layer, pos, window, out); });
  }
  void activate(Mat z, const Activation& activation, Mat y) override {
    time("activate", {}, 0, [&] { inner_.activate(z, activation, y); });
  }
  void glu(Mat gate, Mat up, const Activation& activation, Mat mid) override {
    time("glu", {}, 0, [&] { inner_.glu(gate, up, activation, mid); });
  }
  void log_softmax(Mat x) override {
    time("log_softmax", {}, 0, [&] { inner_.log_softmax(x); });
  }
  void largest(Mat x, std::span<Candidate> to) override {
    time("largest", {}, 0, [&] { inner_.largest(x, to); });
  }

 private:
  /// The name is put together after the clock has stopped.
  template <class Call>
  void time(const char* operation, std::span<const void* const> tensors, int64_t bytes, const Call& call) {
    const auto start = std::chrono::steady_clock::now();
    call();
    inner_.synchronize();
    const auto end = std::chrono::steady_clock::now();
    profile_.add(profile_.name_of(operation, tensors), bytes, end - start);
  }
  template <class Call>
  void time(const char* operation, std::initializer_list<const void*> tensors, int64_t bytes,
            const Call& call) {
    time(operation, std::span<const void* const>(tensors.begin(), tensors.size()), bytes, call);
  }
  template <class Call>
  void time(const char* operation, std::span<const Product> products, int64_t bytes, const Call& call) {
    tensors_.clear();
    for (const Product& p : products) tensors_.push_back(p.weight.data);
    time(operation, std::span<const void* const>(tensors_), bytes, call);
  }

  Backend& inner_;
  Profile& profile_;
  std::unordered_map<const KvCache*, int64_t> position_bytes_;  // of one layer
  std::vector<const void*> tensors_;
};

}  // namespace

std::unique_ptr<Backend> make_profiled_backend(Backend& inner, Profile& profile) {
  return std::make_unique<ProfiledBackend>(inner, profile);
}

}  // namespace larosa
