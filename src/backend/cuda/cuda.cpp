// The CUDA backend: which kernels an operation becomes.
//
// One row (decoding) is bound by bytes and launches, so what only prepares a product is not launched by
// itself. A norm, a gated activation or a selection of one row waits (`Pending`) for the product that reads
// it and is done inside of it, by each of its blocks; the first block writes down the result. A rotation
// waits for attention. An operation that does something else finds nothing waiting: it flushes first.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/memory.h"
#include "base/error.h"

namespace larosa {
namespace cuda {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail("cuda: ", what, ": ", cudaGetErrorString(error));
}

void* allocate_device(int64_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1))) == cudaSuccess) return data;
  cudaGetLastError();
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "memory");
  fail("cuda: ", bytes, " bytes do not fit: ", free, " of ", total, " are free");
}

Buffer::~Buffer() {
  cudaFree(data_);
}

void* Buffer::at_least(int64_t bytes) {
  if (bytes > size_) {
    cudaFree(data_);
    data_ = nullptr;
    size_ = 0;
    data_ = allocate_device(bytes);
    size_ = bytes;
  }
  return data_;
}

namespace {

constexpr int64_t kWidestHead = 256;

bool overlap(const float* a, int64_t n, const float* b, int64_t m) {
  return a && b && a < b + m && b < a + n;
}

/// A list, with the memory behind it.
struct StoredList {
  explicit StoredList(int64_t cols) {
    list.index = static_cast<int32_t*>(index.at_least(cols * 4));
    list.value = static_cast<float*>(value.at_least(cols * 4));
    list.counts = static_cast<int32_t*>(counts.at_least(8));
  }
  Buffer index, value, counts;
  List list;
};

/// One row: the list of what was kept. Several: the rows with zeros, as products take them.
class CudaSelection final : public Selection {
 public:
  CudaSelection(int64_t most_rows, int64_t most_cols)
      : max_rows(most_rows), max_cols(most_cols), one(std::make_shared<StoredList>(most_cols)) {}
  void reset(int64_t r, int64_t c) {
    CHECK(r <= max_rows && c <= max_cols);
    rows = r;
    cols = c;
    if (r == 1) return;
    masked.at_least(r * c * 4);
    kept.at_least(r * 4);
  }
  Mat mat() const { return Mat(masked.get<float>(), rows, cols); }

  const int64_t max_rows, max_cols;
  int64_t rows = 0, cols = 0;
  std::shared_ptr<StoredList> one;
  Buffer masked, kept;
};

class CudaKvCache final : public KvCache {
 public:
  explicit CudaKvCache(const KvShape& s) : shape(s), data(allocate_device(s.capacity * bytes_per_token())) {}
  ~CudaKvCache() override { cudaFree(data); }
  CudaKvCache(const CudaKvCache&) = delete;
  CudaKvCache& operator=(const CudaKvCache&) = delete;
  int64_t bytes_per_token() const override {
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype_size(shape.dtype);
  }
  CacheLayer layer(int64_t l) const {
    const int64_t size = shape.kv_heads * shape.capacity * shape.head_dim * dtype_size(shape.dtype);
    char* keys = static_cast<char*>(data) + 2 * l * size;
    return {keys, keys + size, shape.dtype, shape.kv_heads, shape.head_dim, shape.capacity};
  }

  const KvShape shape;
  void* const data;
};

/// A row that has not been made yet, and what is to be selected from it.
struct Pending {
  Input in;
  Mat row;                           // where it will stand
  std::shared_ptr<StoredList> list;  // of the selection, or null

  bool touches(const float* data, int64_t n) const {
    return overlap(data, n, in.x, in.cols) || overlap(data, n, in.up, in.cols) ||
           overlap(data, n, row.data, row.cols);
  }
};

struct PendingRope {
  Mat q, k;
  int64_t head_dim;
};

/// What waits. Shared with the memory handed out: what is freed is not waited for.
struct Waiting {
  std::optional<Pending> row;
  std::optional<PendingRope> rope;

  void forget(const float* data, int64_t n) {
    if (row && row->touches(data, n)) row.reset();
    if (rope &&
        (overlap(data, n, rope->q.data, rope->q.cols) || overlap(data, n, rope->k.data, rope->k.cols)))
      rope.reset();
  }
};

/// Chooses the device before anything is allocated on it.
Stream make_stream(int device) {
  Stream s;
  s.device = device;
  check(cudaSetDevice(device), "device");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "device");
  if (properties.major < 8) {
    fail("cuda:", device, ": ", properties.name, " has compute capability ", properties.major, ".",
         properties.minor, ", expected 8.0 or more");
  }
  s.multiprocessors = properties.multiProcessorCount;
  s.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin) - kStaticShared;
  s.dependent = properties.major >= 9;
  check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), "stream");
  return s;
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& options)
      : products_(options.products), stream_(make_stream(options.device)), matmul_(stream_) {
    scratch_.partial = static_cast<float*>(partial_.at_least(kPartialFloats * 4));
    scratch_.ticket = static_cast<uint32_t*>(tickets_.at_least(kTickets * 4));
    check(cudaMemsetAsync(scratch_.ticket, 0, kTickets * 4, stream_.stream), "memory");
  }
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
    return {allocate_device(bytes), [waiting = waiting_, bytes](void* data) {
              waiting->forget(static_cast<const float*>(data), bytes / 4);
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
  void synchronize() override {
    flush();
    check(cudaStreamSynchronize(stream_.stream), "kernel");
  }
  double measure_bandwidth(int64_t bytes) override;

  std::unique_ptr<Selection> make_selection(int64_t rows, int64_t cols) override {
    return std::make_unique<CudaSelection>(rows, cols);
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) override {
    if (shape.dtype != DType::f32 && shape.dtype != DType::f16)
      fail("cuda: a key/value cache of ", dtype_name(shape.dtype), " is not supported, expected f32 or f16");
    if (shape.head_dim > kWidestHead)
      fail("cuda: heads of ", shape.head_dim, " entries are not supported, expected at most ", kWidestHead);
    return std::make_unique<CudaKvCache>(shape);
  }

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
    flush();
    if (x.rows > 1 || overlap(x.data, x.cols, y.data, y.cols))
      return cuda::rms_norm(stream_, x, gain, eps, y);
    Input in;
    in.source = Source::norm;
    in.cols = static_cast<int>(x.cols);
    in.x = x.data;
    in.gain = gain;
    in.eps = eps;
    waiting_->row = Pending{in, y, nullptr};
  }

  void matmul(Mat x, std::span<const Product> products) override { multiply(x, products, products_); }

  /// Always float32: the stream passes here once per layer, and bf16 would round it each time.
  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate) override {
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
    if (waiting_->row && waiting_->row->list == s.one) {
      const Pending pending = *waiting_->row;
      if (std::none_of(products.begin(), products.end(),
                       [&](const Product& p) { return pending.touches(p.y.data, p.y.cols); })) {
        waiting_->row.reset();
        return one_row(pending, products);
      }
    }
    flush();
    one_row(listed(s.one, s.cols), products);
  }

  void expand(const Selection& kept, Mat y) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols);
    flush();
    if (s.rows == 1) return expand_list(stream_, s.one->list, y.cols, y.data);
    copy(y.data, y.stride, s.mat().data, y.cols, y.rows, y.cols, cudaMemcpyDeviceToDevice);
  }

  void expand_dropped(const Selection& kept, Mat x, Mat y) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols && x.rows == y.rows && x.cols == y.cols);
    flush();
    mask(stream_, masked(s), false, x, y);
  }

  void matmul_outputs(Mat x, const Selection& kept, const Product& p) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    CHECK(s.rows == p.y.rows && s.cols == p.y.cols && x.cols == p.weight.in && !p.accumulate);
    flush();
    if (x.rows == 1 && p.weight.layout == Layout::rows)
      return gemv_outputs(stream_, plain(x).in, p, s.one->list);
    matmul(x, std::span(&p, 1));
    mask(stream_, masked(s), true, p.y, p.y);
  }

  int64_t count(const Selection& kept) override {
    const CudaSelection& s = static_cast<const CudaSelection&>(kept);
    flush();
    std::vector<int32_t> counts(static_cast<size_t>(s.rows));
    const int32_t* from = s.rows == 1 ? s.one->list.counts + 1 : s.kept.get<int32_t>();
    check(cudaMemcpyAsync(counts.data(), from, counts.size() * 4, cudaMemcpyDeviceToHost, stream_.stream),
          "copy");
    synchronize();
    int64_t total = 0;
    for (int32_t n : counts) total += n;
    return total;
  }

  void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) override {
    CHECK(q.rows == k.rows && q.cols % head_dim == 0 && k.cols % head_dim == 0 && head_dim % 2 == 0);
    flush();
    prepare_angles(pos, q.rows, head_dim / 2, inv_freq);
    waiting_->rope = PendingRope{q, k, head_dim};
    if (q.rows > 1) flush();
  }

  void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
              Mat out) override {
    const CudaKvCache& kv = static_cast<CudaKvCache&>(cache);
    CHECK(pos >= 0 && pos + q.rows <= kv.shape.capacity && layer >= 0 && layer < kv.shape.layers);
    const auto& rope = waiting_->rope;
    const bool rotates = rope && rope->q.data == q.data && rope->k.data == k.data && q.rows == 1 &&
                         rope->head_dim == kv.shape.head_dim;
    if (rotates) waiting_->rope.reset();
    flush();
    cuda::attend(stream_, q, k, v, kv.layer(layer), pos, window, out, rotates ? &angles_ : nullptr, scratch_);
  }

  void activate(Mat z, const Activation& activation, Mat y) override {
    CHECK(z.rows == y.rows && z.cols == y.cols);
    flush();
    cuda::activate(stream_, z, activation, y);
  }

  void glu(Mat gate, Mat up, const Activation& activation, Mat mid) override {
    CHECK(gate.rows == up.rows && gate.cols == up.cols && gate.rows == mid.rows && gate.cols == mid.cols);
    flush();
    if (gate.rows > 1 || overlap(mid.data, mid.cols, gate.data, gate.cols) ||
        overlap(mid.data, mid.cols, up.data, up.cols))
      return cuda::glu(stream_, gate, up, activation, mid);
    Input in;
    in.source = Source::glu;
    in.cols = static_cast<int>(gate.cols);
    in.x = gate.data;
    in.up = up.data;
    in.activation = activation;
    waiting_->row = Pending{in, mid, nullptr};
  }

  void log_softmax(Mat x) override {
    flush();
    cuda::log_softmax(stream_, x);
  }

 private:
  void copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t cols,
            cudaMemcpyKind kind) {
    const auto bytes = [](int64_t n) { return static_cast<size_t>(n) * sizeof(float); };
    if (rows == 0 || cols == 0) return;
    check(cudaMemcpy2DAsync(to, bytes(to_stride), from, bytes(from_stride), bytes(cols),
                            static_cast<size_t>(rows), kind, stream_.stream),
          "copy");
  }

  /// The row on its own: the state that the caller of the door believes in.
  void make(const Pending& p) {
    const Mat x(const_cast<float*>(p.in.x), 1, p.in.cols), up(const_cast<float*>(p.in.up), 1, p.in.cols);
    if (p.in.source == Source::norm) cuda::rms_norm(stream_, x, p.in.gain, p.in.eps, p.row);
    if (p.in.source == Source::glu) cuda::glu(stream_, x, up, p.in.activation, p.row);
    if (p.list)
      cuda::select(stream_, p.in.source == Source::row ? x : p.row, p.in, p.list->list, nullptr, nullptr);
  }

  /// A selection as rows with zeros.
  Mat masked(const CudaSelection& s) {
    if (s.rows > 1) return s.mat();
    auto* const row = static_cast<float*>(dense_.at_least(s.cols * 4));
    expand_list(stream_, s.one->list, s.cols, row);
    return Mat(row, 1, s.cols);
  }

  void flush() {
    if (waiting_->row) {
      const Pending pending = *waiting_->row;
      waiting_->row.reset();
      make(pending);
    }
    if (waiting_->rope) {
      const PendingRope rope = *waiting_->rope;
      waiting_->rope.reset();
      cuda::rope(stream_, rope.q, rope.k, rope.head_dim, angles_);
    }
  }

  void select(Mat x, const Input& rule, CudaSelection& kept) {
    kept.reset(x.rows, x.cols);
    if (x.rows > 1) {
      flush();
      return cuda::select(stream_, x, rule, {}, kept.masked.get<float>(), kept.kept.get<int32_t>());
    }
    Pending next = take_row(x);
    next.in.select = rule.select;
    next.in.keep = rule.keep;
    next.in.cut = rule.cut;
    next.in.scale = rule.scale;
    next.list = kept.one;
    waiting_->row = next;
  }

  /// x as the source of a product: what waits to become it, or x itself.
  Pending take_row(Mat x) {
    const auto& row = waiting_->row;
    if (row && !row->list && row->row.data == x.data && row->row.cols == x.cols) {
      Pending taken = *row;
      waiting_->row.reset();
      flush();
      return taken;
    }
    flush();
    Pending plain;
    plain.in.cols = static_cast<int>(x.cols);
    plain.in.x = x.data;
    plain.row = x;
    return plain;
  }

  static Pending listed(std::shared_ptr<StoredList> list, int64_t cols) {
    Pending p;
    p.in.source = Source::list;
    p.in.cols = static_cast<int>(cols);
    p.list = std::move(list);
    return p;
  }

  void multiply(Mat x, std::span<const Product> products, Products arithmetic) {
    if (x.rows == 1) {
      const auto& row = waiting_->row;
      if (row && std::any_of(products.begin(), products.end(),
                             [&](const Product& p) { return row->touches(p.y.data, p.y.cols); }))
        flush();
      return one_row(take_row(x), products);
    }
    flush();
    for (const Product& p : products) matmul_.run(x, p, arithmetic);
  }

  /// The decoding product. The first launch makes the row and, where more launches or the caller want them,
  /// writes down row and list for them.
  void one_row(Pending from, std::span<const Product> products) {
    for (const Product& p : products) CHECK(p.weight.in == from.in.cols && p.y.cols == p.weight.out);
    for (size_t first = 0, end = 0; first < products.size(); first = end) {
      const Weight& w = products[first].weight;
      for (end = first + 1; end < products.size() && end - first < kMostProducts; ++end)
        if (!gemv_together(w, products[end].weight)) break;
      if (w.layout == Layout::rows) {
        end = first + 1;
        from = rows_product(from, products[first]);
        continue;
      }
      const bool more = end < products.size();
      if (from.in.source != Source::list && !gemv_fuses(stream_, from.in, w)) from = into_list(from);
      Input in = from.in;
      if (in.source == Source::list || from.list || more) in.list = list_of(from)->list;
      if (in.source == Source::norm || in.source == Source::glu) in.values = from.row.data;
      gemv(stream_, in, products.subspan(first, end - first), scratch_);
      if (more && in.source != Source::list) from = listed(list_of(from), in.cols);
    }
  }

  /// The list of a row: its selection's, or one of ours that keeps every entry.
  std::shared_ptr<StoredList> list_of(const Pending& p) {
    if (p.list) return p.list;
    if (!every_ || every_cols_ < p.in.cols) {
      every_ = std::make_shared<StoredList>(p.in.cols);
      every_cols_ = p.in.cols;
    }
    return every_;
  }
  Pending into_list(Pending p) {
    p.list = list_of(p);
    make(p);
    return listed(p.list, p.in.cols);
  }

  /// A product with a weight in rows layout; returns the row for the next one.
  Pending rows_product(Pending from, const Product& product) {
    const bool selected = from.in.select != Selects::all || from.in.source == Source::list;
    if (selected) {
      if (from.in.source != Source::list) from = into_list(from);
      float* dense = static_cast<float*>(dense_.at_least(from.in.cols * 4));
      expand_list(stream_, from.list->list, from.in.cols, dense);
      Input in;
      in.cols = from.in.cols;
      in.x = dense;
      gemv_rows(stream_, in, product);
      return from;
    }
    if (from.in.source == Source::glu) {
      make(from);
      from = plain(from.row);
    }
    Input in = from.in;
    if (in.source == Source::norm) in.values = from.row.data;
    gemv_rows(stream_, in, product);
    return plain(from.row);
  }
  static Pending plain(Mat row) {
    Pending p;
    p.in.cols = static_cast<int>(row.cols);
    p.in.x = row.data;
    p.row = row;
    return p;
  }

  /// Layers ask for the same positions one after another: the angles are kept.
  void prepare_angles(int64_t pos, int64_t rows, int64_t half, const float* inv_freq) {
    if (angles_pos_ == pos && angles_rows_ >= rows && angles_half_ == half && inv_freq_ == inv_freq) return;
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
  const std::shared_ptr<Waiting> waiting_ = std::make_shared<Waiting>();
  Buffer partial_, tickets_, tokens_, dense_, cosine_, sine_;
  Scratch scratch_;
  std::shared_ptr<StoredList> every_;
  int64_t every_cols_ = 0;
  Angles angles_;
  int64_t angles_pos_ = -1, angles_rows_ = 0, angles_half_ = 0;
  const float* inv_freq_ = nullptr;
};

/// Copies within the device, bytes read and written, median of seven.
double CudaBackend::measure_bandwidth(int64_t bytes) {
  constexpr int kTimes = 7;
  bytes = std::max(bytes, int64_t{1} << 30);  // an H200 copies 512 MiB at 3.96 TB/s, 1 GiB at 4.23
  flush();
  Buffer from, to;
  from.at_least(bytes);
  to.at_least(bytes);
  check(cudaMemsetAsync(from.get<void>(), 0x5a, static_cast<size_t>(bytes), stream_.stream), "memory");
  cudaEvent_t start{}, stop{};
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<double> rates;
  for (int i = 0; i <= kTimes; ++i) {
    check(cudaEventRecord(start, stream_.stream), "event");
    check(cudaMemcpyAsync(to.get<void>(), from.get<void>(), static_cast<size_t>(bytes),
                          cudaMemcpyDeviceToDevice, stream_.stream),
          "copy");
    check(cudaEventRecord(stop, stream_.stream), "event");
    check(cudaEventSynchronize(stop), "event");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "event");
    if (i > 0) rates.push_back(2e-6 * static_cast<double>(bytes) / static_cast<double>(ms));
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(rates.begin(), rates.end());
  return rates[kTimes / 2];
}

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<cuda::CudaBackend>(options);
}

}  // namespace larosa
