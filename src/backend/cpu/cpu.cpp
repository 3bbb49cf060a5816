// The fast CPU backend: how each operation is split over the threads. The arithmetic is in the stems beside
// it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <vector>

#include "backend/backend.h"
#include "backend/bandwidth.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/matmul.h"
#include "base/error.h"
#include "base/quant.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

// Up to here the rows go through the decoding kernels one by one, beyond it oneDNN wins.
constexpr int64_t kFewRows = 2;
constexpr int64_t kPage = 4096;
constexpr size_t kDTypes = static_cast<size_t>(DType::int4) + 1;
constexpr int64_t kSlack = 64;  // kernels may write one vector past the last kept entry

/// Floats aligned to a cache line.
class AlignedFloats {
 public:
  float* at_least(int64_t n) {
    constexpr size_t kLine = 64;
    if (n > size_) {
      memory_.reset(static_cast<float*>(
          std::aligned_alloc(kLine, (static_cast<size_t>(n) * 4 + kLine - 1) / kLine * kLine)));
      CHECK(memory_ != nullptr);
      size_ = n;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

/// A list of channels that owns its memory.
class Channels {
 public:
  Channels() = default;
  Channels(const Channels&) = delete;
  Channels& operator=(const Channels&) = delete;

  ChannelList& at_least(int64_t channels) {
    const size_t size = static_cast<size_t>(channels + kSlack);
    if (index_.size() < size) {
      index_.resize(size);
      value_.resize(size);
      list_.index = index_.data();
      list_.value = value_.data();
    }
    return list_;
  }
  const ChannelList& list() const { return list_; }
  /// body(index, value) for every entry.
  template <class Body>
  void each(const Body& body) const {
    for (int64_t c = 0; c < list_.count; ++c) body(list_.index[c], list_.value[c]);
  }

 private:
  std::vector<int32_t> index_;
  std::vector<float> value_;
  ChannelList list_ = {};
};

/// One row: the list of what was kept. Several: the rows themselves with zeros, as oneDNN wants them.
class CpuSelection final : public Selection {
 public:
  CpuSelection(int64_t most_rows, int64_t most_cols) : max_rows(most_rows), max_cols(most_cols) {
    channels.at_least(most_cols);
  }
  void reset(int64_t r, int64_t c) {
    CHECK(r <= max_rows && c <= max_cols);
    rows = r;
    cols = c;
    if (r > 1 && masked.size() < static_cast<size_t>(r * c)) masked.resize(static_cast<size_t>(r * c));
  }
  Mat mat() const { return Mat(const_cast<float*>(masked.data()), rows, cols); }

  const int64_t max_rows, max_cols;
  int64_t rows = 0, cols = 0, kept = 0;
  Channels channels;          // one row
  std::vector<float> masked;  // (rows, cols); several rows
};

constexpr Cut kNothing = {0x7fffffff, 0}, kEverything = {-1, 0};

class CpuBackend final : public Backend {
 public:
  CpuBackend(const CpuOptions& options, ThreadPool& pool)
      : products_(options.products),
        pool_(pool),
        kernels_(choose_kernels()),
        matmul_(kernels_, pool),
        attention_(kernels_, pool),
        work_(static_cast<size_t>(pool.size())) {}

  std::string describe() const override {
    std::ostringstream text;
    text << "cpu, " << pool_.size() << (pool_.size() == 1 ? " thread, " : " threads, ") << kernels_.target
         << ", products " << products_name() << " (oneDNN " << onednn_isa() << ")";
    return text.str();
  }
  std::string products_name() const override { return products_ == Products::bf16 ? "bf16" : "float32"; }

  double measure_bandwidth(int64_t bytes) override { return measure_read_bandwidth(pool_, bytes); }

  std::unique_ptr<Selection> make_selection(int64_t rows, int64_t cols) override {
    return std::make_unique<CpuSelection>(rows, cols);
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) override {
    return std::make_unique<CpuKvCache>(shape);
  }

  void embed(const Weight& table, std::span<const int32_t> tokens, Mat x) override {
    CHECK(table.layout == Layout::rows && x.cols == table.in &&
          x.rows == static_cast<int64_t>(tokens.size()));
    each_row(x.rows, [&](int, int64_t t) {
      const int64_t token = tokens[static_cast<size_t>(t)];
      CHECK(token >= 0 && token < table.out);
      kernels_.widen_line(table, token, 0, x.cols, x.row(t));
    });
  }

  void rms_norm(Mat x, const float* gain, float eps, Mat y) override {
    CHECK(x.rows == y.rows && x.cols == y.cols);
    each_row(x.rows, [&](int, int64_t t) { kernels_.rms_norm(x.row(t), gain, eps, x.cols, y.row(t)); });
  }

  void matmul(Mat x, std::span<const Product> products) override { multiply(x, products, products_); }

  /// Always float32: the stream passes here once per layer, and bf16 would round it each time.
  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate) override {
    const Product product{basis, y, accumulate};
    multiply(x, std::span(&product, 1), Products::f32);
  }

  void topk(Mat x, const float* scale, int64_t keep, Selection& kept) override {
    CHECK(keep >= 0 && keep <= x.cols);
    select(x, scale, kept, [&](const float* row, int32_t* work) {
      if (keep == 0) return kNothing;
      return keep < x.cols ? kernels_.find_cut(row, scale, x.cols, keep, work) : kEverything;
    });
  }

  void threshold(Mat x, const float* scale, float cut, Selection& kept) override {
    // Keys are the bits of non-negative floats: so is the cut. Below zero, and for NaN, everything is kept.
    const Cut key{cut > 0 ? std::bit_cast<int32_t>(cut) : cut == 0 ? 0 : -1, 0};
    select(x, scale, kept, [&](const float*, int32_t*) { return key; });
  }

  void sparse_matmul(const Selection& kept, std::span<const Product> products) override {
    const CpuSelection& s = static_cast<const CpuSelection&>(kept);
    if (s.rows == 1) return one_row(nullptr, s.cols, &s, products, 0);
    matmul(s.mat(), products);
  }

  void expand(const Selection& kept, Mat y) override {
    const CpuSelection& s = static_cast<const CpuSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols);
    if (s.rows == 1) return scatter(s, y.data);
    each_row(y.rows, [&](int, int64_t t) { std::copy_n(s.mat().row(t), y.cols, y.row(t)); });
  }

  void expand_dropped(const Selection& kept, Mat x, Mat y) override {
    const CpuSelection& s = static_cast<const CpuSelection&>(kept);
    CHECK(s.rows == y.rows && s.cols == y.cols && x.rows == y.rows && x.cols == y.cols);
    each_row(y.rows, [&](int, int64_t t) {
      if (s.rows > 1) return kernels_.mask(s.mat().row(t), false, x.row(t), y.cols, y.row(t));
      if (x.data != y.data) std::copy_n(x.data, y.cols, y.data);
      s.channels.each([&](int32_t i, float) { y.data[i] = 0; });
    });
  }

  void matmul_outputs(Mat x, const Selection& kept, const Product& p) override {
    const CpuSelection& s = static_cast<const CpuSelection&>(kept);
    CHECK(s.rows == p.y.rows && s.cols == p.y.cols && !p.accumulate);
    if (x.rows == 1 && p.weight.layout == Layout::rows) return some_outputs(x, s, p);
    matmul(x, std::span(&p, 1));
    if (x.rows == 1) dense_.resize(std::max(dense_.size(), static_cast<size_t>(s.cols)));
    if (x.rows == 1) scatter(s, dense_.data());
    each_row(x.rows, [&](int, int64_t t) {
      kernels_.mask(x.rows == 1 ? dense_.data() : s.mat().row(t), true, p.y.row(t), p.y.cols, p.y.row(t));
    });
  }

  int64_t count(const Selection& kept) override { return static_cast<const CpuSelection&>(kept).kept; }

  void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) override {
    CHECK(q.rows == k.rows && q.cols % head_dim == 0 && k.cols % head_dim == 0 && head_dim % 2 == 0);
    const int64_t half = head_dim / 2;
    prepare_angles(pos, q.rows, half, inv_freq);
    each_row(q.rows, [&](int, int64_t t) {
      const float* cosine = &cosine_[static_cast<size_t>(t * half)];
      const float* sine = &sine_[static_cast<size_t>(t * half)];
      for (const Mat& m : {q, k}) {
        for (int64_t e = 0; e < m.cols; e += head_dim) kernels_.rope(cosine, sine, half, m.row(t) + e);
      }
    });
  }

  void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
              Mat out) override {
    attention_.run(q, k, v, static_cast<CpuKvCache&>(cache), layer, pos, window, out);
  }

  void activate(Mat z, const Activation& activation, Mat y) override {
    CHECK(z.rows == y.rows && z.cols == y.cols);
    each_part(z, [&](int64_t t, int64_t begin, int64_t n) {
      kernels_.activate(z.row(t) + begin, activation, n, y.row(t) + begin);
    });
  }

  void glu(Mat gate, Mat up, const Activation& activation, Mat mid) override {
    CHECK(gate.rows == up.rows && gate.cols == up.cols && gate.rows == mid.rows && gate.cols == mid.cols);
    each_part(gate, [&](int64_t t, int64_t begin, int64_t n) {
      kernels_.glu(gate.row(t) + begin, up.row(t) + begin, activation, n, mid.row(t) + begin);
    });
  }

  void log_softmax(Mat x) override {
    each_row(x.rows, [&](int, int64_t t) { kernels_.log_softmax(x.cols, x.row(t)); });
  }

 private:
  /// body(thread, t) for every row; a single row stays on the caller.
  template <class Body>
  void each_row(int64_t rows, const Body& body) {
    if (rows == 1) return body(0, 0);
    pool_.run([&](int thread) {
      const int64_t end = rows * (thread + 1) / pool_.size();
      for (int64_t t = rows * thread / pool_.size(); t < end; ++t) body(thread, t);
    });
  }

  /// body(t, first, n): whole rows, or parts of a single one.
  template <class Body>
  void each_part(Mat x, const Body& body) {
    if (x.rows > 1) return each_row(x.rows, [&](int, int64_t t) { body(t, int64_t{0}, x.cols); });
    pool_.split(x.cols, 1024, [&](int64_t begin, int64_t end) { body(int64_t{0}, begin, end - begin); });
  }

  /// One row: every thread an even share of the kept outputs, whose weights are all that is read.
  void some_outputs(Mat x, const CpuSelection& s, const Product& p) {
    CHECK(p.weight.in == x.cols && p.y.cols == p.weight.out);
    pack_rows(x.data, x.cols, nullptr, std::span(&p, 1));
    const float* packed = packed_row(p.weight.dtype, x.cols);
    std::fill_n(p.y.data, p.y.cols, 0.0f);
    pool_.run([&](int thread) {
      const ChannelList& list = s.channels.list();
      const int64_t begin = list.count * thread / pool_.size();
      const int64_t end = list.count * (thread + 1) / pool_.size();
      kernels_.gemv_outputs(p.weight, packed, list.index + begin, end - begin, p.y.data);
    });
  }

  void multiply(Mat x, std::span<const Product> products, Products arithmetic) {
    if (x.rows > kFewRows) return matmul_.run(x, products, arithmetic);
    for (int64_t t = 0; t < x.rows; ++t) one_row(x.row(t), x.cols, nullptr, products, t);
  }

  template <class FindCut>
  void select(Mat x, const float* scale, Selection& kept, const FindCut& find_cut) {
    CpuSelection& s = static_cast<CpuSelection&>(kept);
    s.reset(x.rows, x.cols);
    std::vector<int64_t> counts(x.rows > 1 ? work_.size() : 0);
    const size_t room = static_cast<size_t>(x.cols + kSlack);
    each_row(x.rows, [&](int thread, int64_t t) {
      std::vector<int32_t>& work = work_[static_cast<size_t>(thread)];
      if (work.size() < room) work.resize(room);
      const Cut cut = find_cut(x.row(t), work.data());
      if (x.rows == 1) {
        s.kept = kernels_.take_list(x.row(t), scale, x.cols, cut, s.channels.at_least(x.cols));
      } else {
        counts[static_cast<size_t>(thread)] +=
            kernels_.take_masked(x.row(t), scale, x.cols, cut, s.mat().row(t));
      }
    });
    if (x.rows == 1) return;
    s.kept = 0;
    for (int64_t n : counts) s.kept += n;
  }

  static void scatter(const CpuSelection& s, float* y) {
    std::fill_n(y, s.cols, 0.0f);
    s.channels.each([&](int32_t i, float value) { y[i] = value; });
  }

  /// Every channel of a dense row that is not zero.
  const ChannelList& every_channel(const float* x, int64_t cols) {
    ChannelList& list = every_.at_least(cols);
    kernels_.take_list(x, nullptr, cols, kEverything, list);
    return list;
  }

  /// The decoding product: row t of every y, from a dense row or from what a one-row selection kept.
  void one_row(const float* x, int64_t cols, const CpuSelection* kept, std::span<const Product> products,
               int64_t t) {
    for (const Product& p : products) CHECK(p.weight.in == cols && p.y.cols == p.weight.out);
    int64_t in_channels = 0, row_bytes = 0;
    for (const Product& p : products) {
      in_channels += p.weight.layout == Layout::channels;
      row_bytes = std::max(row_bytes, channel_bytes(p.weight));
    }
    const ChannelList list = in_channels == 0 ? ChannelList{}
                             : kept           ? kept->channels.list()
                                              : every_channel(x, cols);
    pack_rows(x, cols, kept, products);
    // Narrow: a thread's share of a row would be a page or less; pairs of threads share outputs and each
    // takes a chain (kernels.h).
    const int threads = pool_.size();
    const bool by_chain = in_channels == static_cast<int64_t>(products.size()) && threads % kChains == 0 &&
                          row_bytes <= kPage * threads;
    const int64_t groups = by_chain ? threads / kChains : threads;
    const int64_t outputs = padded_outputs(products);
    float* parts[kChains];
    for (int64_t c = 0; c < kChains; ++c) parts[c] = parts_[c].at_least(outputs);

    pool_.run([&](int thread) {
      const int64_t group = by_chain ? thread / kChains : thread;
      each_range(products, group, groups, [&](const Product& p, int64_t base, int64_t begin, int64_t end) {
        if (p.weight.layout == Layout::rows) {
          const float* row = packed_row(p.weight.dtype, cols);
          return kernels_.gemv_rows(p.weight, row, begin, end, p.accumulate, p.y.row(t));
        }
        for (int64_t c = 0; c < kChains; ++c) {
          if (by_chain && c != thread % kChains) continue;
          const ChannelList chain = list.chain(c);
          kernels_.gemv_chain(p.weight, chain.index, chain.value, chain.count, begin, end,
                              parts[c] + base + begin);
        }
        if (!by_chain) join(p, parts, base, begin, end, t);
      });
    });
    if (!by_chain) return;
    pool_.run([&](int thread) {
      each_range(products, thread, threads, [&](const Product& p, int64_t base, int64_t begin, int64_t end) {
        join(p, parts, base, begin, end, t);
      });
    });
  }

  void join(const Product& p, float* const* parts, int64_t base, int64_t begin, int64_t end, int64_t t) {
    kernels_.gemv_join(p.weight, parts[0] + base + begin, parts[1] + base + begin, begin, end, p.accumulate,
                       p.y.row(t));
  }

  static int64_t padded_outputs(std::span<const Product> products) {
    int64_t sum = 0;
    for (const Product& p : products) sum += padded_line(p.weight.out);
    return sum;
  }
  /// Bytes of an input's outputs, whatever the layout.
  static int64_t channel_bytes(const Weight& w) { return line_bytes(w.dtype, w.out); }

  /// body(product, base, begin, end) for the outputs of share `share` of `shares`: all outputs together cut
  /// into even shares of bytes, at whole blocks of 128, so that no line of y is shared. `base`: padded
  /// outputs of the products before.
  template <class Body>
  static void each_range(std::span<const Product> products, int64_t share, int64_t shares, const Body& body) {
    int64_t total = 0, bytes = 0, base = 0;
    for (const Product& p : products) total += channel_bytes(p.weight);
    const int64_t low = total * share / shares, high = total * (share + 1) / shares;
    for (const Product& p : products) {
      const int64_t size = channel_bytes(p.weight), out = p.weight.out;
      const auto output = [&](int64_t byte) {
        return std::clamp<int64_t>(padded_line((byte - bytes) * out / size), 0, out);
      };
      const int64_t begin = output(low), end = share + 1 == shares ? out : output(high);
      if (begin < end) body(p, base, begin, end);
      bytes += size;
      base += padded_line(out);
    }
  }

  /// The row as gemv_rows wants it, for the element types among the products in rows layout.
  void pack_rows(const float* x, int64_t cols, const CpuSelection* kept, std::span<const Product> products) {
    bool packed[kDTypes] = {};
    for (const Product& p : products) {
      bool& done = packed[static_cast<size_t>(p.weight.dtype)];
      if (p.weight.layout != Layout::rows || done) continue;
      if (!x) {
        dense_.resize(std::max(dense_.size(), static_cast<size_t>(cols)));
        scatter(*kept, dense_.data());
        x = dense_.data();
      }
      kernels_.pack_input(x, p.weight.dtype, cols, packed_row(p.weight.dtype, cols));
      done = true;
    }
  }
  float* packed_row(DType dtype, int64_t cols) {
    return packed_[static_cast<size_t>(dtype)].at_least(padded_line(cols));
  }

  /// Layers ask for the same positions one after another: the angles are kept.
  void prepare_angles(int64_t pos, int64_t rows, int64_t half, const float* inv_freq) {
    const size_t bytes = static_cast<size_t>(half) * sizeof(float);
    const bool same = static_cast<int64_t>(inv_freq_.size()) == half && angle_pos_ == pos &&
                      angle_rows_ >= rows && std::memcmp(inv_freq_.data(), inv_freq, bytes) == 0;
    if (same) return;
    inv_freq_.assign(inv_freq, inv_freq + half);
    angle_pos_ = pos;
    angle_rows_ = rows;
    cosine_.resize(std::max(cosine_.size(), static_cast<size_t>(rows * half)));
    sine_.resize(cosine_.size());
    each_row(rows, [&](int, int64_t t) {
      for (int64_t i = 0; i < half; ++i) {
        // The float32 product, as the models were trained with; cosine and sine of that, rounded once.
        const double angle = static_cast<float>(pos + t) * inv_freq[i];
        cosine_[static_cast<size_t>(t * half + i)] = static_cast<float>(std::cos(angle));
        sine_[static_cast<size_t>(t * half + i)] = static_cast<float>(std::sin(angle));
      }
    });
  }

  const Products products_;
  ThreadPool& pool_;
  const Kernels kernels_;
  Matmul matmul_;
  Attention attention_;
  std::vector<std::vector<int32_t>> work_;  // per thread: keys of a selection
  Channels every_;                          // of a dense row
  AlignedFloats parts_[kChains];            // sums of each chain, all products of a call
  std::vector<float> dense_;                // one row of a selection, for weights in rows layout
  AlignedFloats packed_[kDTypes];           // one row as gemv_rows wants it for weights of a type
  std::vector<float> cosine_, sine_;        // (angle_rows_, half)
  std::vector<float> inv_freq_;
  int64_t angle_pos_ = -1, angle_rows_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options, ThreadPool& pool) {
  return std::make_unique<CpuBackend>(options, pool);
}

}  // namespace larosa
