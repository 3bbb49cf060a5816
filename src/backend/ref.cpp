// What every operation of the door means: plain loops, double sums, one rounding at the end, no speed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/backend.h"
#include "backend/bandwidth.h"
#include "base/error.h"
#include "base/quant.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

/// The kept entries as a mask beside a copy of the rows.
class RefSelection final : public Selection {
 public:
  void reset(Mat x) {
    rows = x.rows;
    cols = x.cols;
    values.assign(static_cast<size_t>(rows * cols), 0.0f);
    kept = 0;
  }
  void keep(int64_t t, int64_t i, float value) {
    values[static_cast<size_t>(t * cols + i)] = value;
    ++kept;
  }

  float at(int64_t t, int64_t i) const { return values[static_cast<size_t>(t * cols + i)]; }

  int64_t rows = 0, cols = 0, kept = 0;
  std::vector<float> values;  // (rows, cols), zero where dropped
};

/// What a cache of `dtype` makes of one head's key or value (n) at one position.
void round_head(DType dtype, const float* x, int64_t n, double* stored) {
  if (dtype != DType::int8) {
    char element[4];
    for (int64_t e = 0; e < n; ++e) {
      store_element(element, dtype, 0, x[e]);
      stored[e] = load_element(element, dtype, 0);
    }
    return;
  }
  float most = 0;
  for (int64_t e = 0; e < n; ++e) most = std::isnan(x[e]) ? x[e] : std::max(most, std::fabs(x[e]));
  const float scale = most < 0x1p-100f ? 0 : most / 127, inverse = most < 0x1p-100f ? 0 : 127 / most;
  for (int64_t e = 0; e < n; ++e) {
    stored[e] = std::isfinite(most) ? double{scale} * std::nearbyint(x[e] * inverse)
                                    : std::numeric_limits<double>::quiet_NaN();
  }
}

/// Keys and values as one growing array per layer, of what storing leaves of them.
class RefKvCache final : public KvCache {
 public:
  explicit RefKvCache(const KvShape& s) : shape(s), keys(size_t(s.layers)), values(size_t(s.layers)) {}
  int64_t bytes_per_token() const override { return shape.bytes_per_token(); }
  int64_t width() const { return shape.kv_heads * shape.head_dim; }

  void append(std::vector<double>& rows, Mat x, int64_t pos) const {
    rows.resize(std::max(rows.size(), static_cast<size_t>((pos + x.rows) * width())));
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t i = 0; i < width(); i += shape.head_dim) {
        round_head(shape.dtype, x.row(t) + i, shape.head_dim, &rows[size_t((pos + t) * width() + i)]);
      }
    }
  }
  double at(const std::vector<double>& rows, int64_t pos, int64_t g, int64_t e) const {
    return rows[size_t(pos * width() + g * shape.head_dim + e)];
  }

  KvShape shape;
  std::vector<std::vector<double>> keys, values;  // per layer (positions, G, E)
};

double activated(double z, const Activation& activation) {
  switch (activation.kind) {
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::relu:
      return z <= double{activation.threshold} ? 0 : z;
    case Activation::relu2:
      return z <= 0 ? 0 : z * z;
    case Activation::drelu:
      return z <= 0 ? 0 : z;
  }
  return 0;
}

/// |x · scale| in float32, as every backend computes it; NaN becomes larger than infinity.
double score(float x, const float* scale, int64_t i) {
  const float s = std::fabs(scale ? x * scale[i] : x);
  return std::isnan(s)                                ? std::numeric_limits<double>::infinity()
         : s < std::numeric_limits<float>::infinity() ? static_cast<double>(s)
                                                      : std::numeric_limits<double>::max();
}

class RefBackend final : public Backend {
 public:
  std::string describe() const override { return "ref, 1 thread, plain loops, products float64"; }
  std::string products_name() const override { return "float64"; }
  double measure_bandwidth(int64_t bytes) override {
    ThreadPool pool(1);
    return measure_read_bandwidth(pool, bytes);
  }

  std::unique_ptr<Selection> make_selection(int64_t, int64_t) override {
    return std::make_unique<RefSelection>();
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvShape& shape) override {
    CHECK(std::ranges::count(kKvTypes, shape.dtype) == 1);
    return std::make_unique<RefKvCache>(shape);
  }

  void embed(const Weight& table, std::span<const int32_t> tokens, Mat x) override {
    CHECK(table.layout == Layout::rows && x.cols == table.in && x.rows == int64_t(tokens.size()));
    for (int64_t t = 0; t < x.rows; ++t) {
      const int64_t token = tokens[static_cast<size_t>(t)];
      CHECK(token >= 0 && token < table.out);
      read_line(table.line(token), table.dtype, x.cols, 0, x.cols, x.row(t));
    }
  }

  void rms_norm(Mat x, const float* gain, float eps, Mat y) override {
    CHECK(x.rows == y.rows && x.cols == y.cols);
    for (int64_t t = 0; t < x.rows; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < x.cols; ++i) sum += double(x.row(t)[i]) * x.row(t)[i];
      const double factor = 1 / std::sqrt(sum / double(x.cols) + eps);
      for (int64_t i = 0; i < x.cols; ++i) {
        y.row(t)[i] = static_cast<float>(x.row(t)[i] * factor * (gain ? gain[i] : 1.0));
      }
    }
  }

  void matmul(Mat x, std::span<const Product> products) override {
    for (const Product& p : products) product(x, p);
  }

  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate) override {
    product(x, Product{basis, y, accumulate});
  }

  void topk(Mat x, const float* scale, int64_t keep, Selection& kept) override {
    CHECK(keep >= 0 && keep <= x.cols);
    RefSelection& selection = static_cast<RefSelection&>(kept);
    selection.reset(x);
    std::vector<int64_t> order(static_cast<size_t>(x.cols));
    for (int64_t t = 0; t < x.rows; ++t) {
      const float* row = x.row(t);
      std::iota(order.begin(), order.end(), int64_t{0});
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return score(row[a], scale, a) > score(row[b], scale, b);
      });
      for (int64_t s = 0; s < keep; ++s) selection.keep(t, order[size_t(s)], row[order[size_t(s)]]);
    }
  }

  void threshold(Mat x, const float* scale, float cut, Selection& kept) override {
    RefSelection& selection = static_cast<RefSelection&>(kept);
    selection.reset(x);
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t i = 0; i < x.cols; ++i) {
        const float value = x.row(t)[i];
        const float s = scale ? std::fabs(value) * scale[i] : std::fabs(value);
        if (!(s <= cut)) selection.keep(t, i, value);
      }
    }
  }

  void sparse_matmul(const Selection& kept, std::span<const Product> products) override {
    RefSelection rows = static_cast<const RefSelection&>(kept);
    matmul(Mat(rows.values.data(), rows.rows, rows.cols), products);
  }

  void expand(const Selection& kept, Mat y) override {
    const RefSelection& selection = static_cast<const RefSelection&>(kept);
    CHECK(selection.rows == y.rows && selection.cols == y.cols);
    for (int64_t t = 0; t < y.rows; ++t) std::copy_n(&selection.values[size_t(t * y.cols)], y.cols, y.row(t));
  }

  void expand_dropped(const Selection& kept, Mat x, Mat y) override {
    const RefSelection& selection = static_cast<const RefSelection&>(kept);
    CHECK(selection.rows == y.rows && selection.cols == y.cols && x.rows == y.rows && x.cols == y.cols);
    for (int64_t t = 0; t < y.rows; ++t) {
      for (int64_t i = 0; i < y.cols; ++i) y.row(t)[i] = selection.at(t, i) != 0 ? 0 : x.row(t)[i];
    }
  }

  void matmul_outputs(Mat x, const Selection& kept, const Product& p) override {
    const RefSelection& selection = static_cast<const RefSelection&>(kept);
    CHECK(selection.rows == p.y.rows && selection.cols == p.y.cols && !p.accumulate);
    product(x, p);
    for (int64_t t = 0; t < p.y.rows; ++t) {
      for (int64_t j = 0; j < p.y.cols; ++j) {
        if (selection.at(t, j) == 0) p.y.row(t)[j] = 0;
      }
    }
  }

  int64_t count(const Selection& kept) override { return static_cast<const RefSelection&>(kept).kept; }

  void rope(Mat q, Mat k, int64_t head_dim, int64_t pos, const float* inv_freq) override {
    const int64_t half = head_dim / 2;
    for (const Mat& m : {q, k}) {
      for (int64_t t = 0; t < m.rows; ++t) {
        for (float* head = m.row(t); head < m.row(t) + m.cols; head += head_dim) {
          for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(pos + t) * inv_freq[i];
            const double c = static_cast<float>(std::cos(double{angle}));
            const double s = static_cast<float>(std::sin(double{angle}));
            const double a = head[i], b = head[i + half];
            head[i] = static_cast<float>(a * c - b * s);
            head[i + half] = static_cast<float>(b * c + a * s);
          }
        }
      }
    }
  }

  void attend(Mat q, Mat k, Mat v, KvCache& cache, int64_t layer, int64_t pos, int64_t window,
              Mat out) override {
    RefKvCache& kv = static_cast<RefKvCache&>(cache);
    CHECK(pos >= 0 && pos + q.rows <= kv.shape.capacity && layer >= 0 && layer < kv.shape.layers);
    const std::vector<double>& keys = kv.keys[size_t(layer)];
    const std::vector<double>& values = kv.values[size_t(layer)];
    kv.append(kv.keys[size_t(layer)], k, pos);
    kv.append(kv.values[size_t(layer)], v, pos);
    const int64_t width = kv.shape.head_dim, heads = q.cols / width;
    for (int64_t t = 0; t < q.rows; ++t) {
      const int64_t last = pos + t, first = window > 0 ? std::max<int64_t>(0, last - window + 1) : 0;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = h / (heads / kv.shape.kv_heads);
        std::vector<double> weight(static_cast<size_t>(last - first + 1));
        for (int64_t j = first; j <= last; ++j) {
          double dot = 0;
          for (int64_t e = 0; e < width; ++e) dot += q.row(t)[h * width + e] * kv.at(keys, j, g, e);
          weight[size_t(j - first)] = dot / std::sqrt(double(width));
        }
        const double top = *std::max_element(weight.begin(), weight.end());
        double sum = 0;
        for (double& w : weight) sum += w = std::exp(w - top);
        for (int64_t e = 0; e < width; ++e) {
          double mean = 0;
          for (int64_t j = first; j <= last; ++j) mean += weight[size_t(j - first)] * kv.at(values, j, g, e);
          out.row(t)[h * width + e] = static_cast<float>(mean / sum);
        }
      }
    }
  }

  void activate(Mat z, const Activation& activation, Mat y) override {
    for (int64_t t = 0; t < z.rows; ++t) {
      for (int64_t i = 0; i < z.cols; ++i)
        y.row(t)[i] = static_cast<float>(activated(z.row(t)[i], activation));
    }
  }

  void glu(Mat gate, Mat up, const Activation& activation, Mat mid) override {
    const bool both = activation.kind == Activation::drelu;
    for (int64_t t = 0; t < gate.rows; ++t) {
      for (int64_t i = 0; i < gate.cols; ++i) {
        const double u = up.row(t)[i];
        mid.row(t)[i] = static_cast<float>(activated(gate.row(t)[i], activation) * (both && u <= 0 ? 0 : u));
      }
    }
  }

  void log_softmax(Mat x) override {
    for (int64_t t = 0; t < x.rows; ++t) {
      float* row = x.row(t);
      const double top = *std::max_element(row, row + x.cols);
      double sum = 0;
      for (int64_t i = 0; i < x.cols; ++i) sum += std::exp(row[i] - top);
      const double total = top + std::log(sum);
      for (int64_t i = 0; i < x.cols; ++i) row[i] = static_cast<float>(row[i] - total);
    }
  }

 private:
  static void product(Mat x, const Product& p) {
    const Weight& w = p.weight;
    CHECK(x.cols == w.in && p.y.cols == w.out && p.y.rows == x.rows);
    const std::vector<float> values = read_weight(w);
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t j = 0; j < w.out; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < w.in; ++i) {
          sum +=
              double(x.row(t)[i]) * values[size_t(w.layout == Layout::rows ? j * w.in + i : i * w.out + j)];
        }
        if (w.bias) sum += w.bias[j];
        if (p.accumulate) sum += p.y.row(t)[j];
        p.y.row(t)[j] = static_cast<float>(sum);
      }
    }
  }
};

}  // namespace

std::unique_ptr<Backend> make_ref_backend() {
  return std::make_unique<RefBackend>();
}

}  // namespace larosa
