#include "calib/statistics.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/progress.h"

namespace larosa {
namespace {

/// Adds what passes the sites to a layer's moments.
class MomentObserver : public Observer {
 public:
  MomentObserver(const ModelConfig& config, Backend& backend, ThreadPool& pool, const Wants& wants,
                 const Choice& choice, Moments& moments)
      : config_(config), backend_(backend), pool_(pool), wants_(wants), choice_(choice), moments_(moments) {}

  void see(Site site, Mat entries, Mat stream) override {
    if (site == Site::h2 && wants_.heads) return add_heads(entries);
    if (!wants_.stream || (site != Site::h1 && !(site == Site::h3 && choice_.source != Source::h1))) return;
    if (!choice_.after_gain) {  // the foldable form rotates the normalised stream before its gain
      buffer_.resize(static_cast<size_t>(stream.rows * stream.cols));
      entries = Mat(buffer_.data(), stream.rows, stream.cols);
      backend_.rms_norm(stream, nullptr, config_.norm_eps, entries);
    }
    add_second_moment(widened(entries, 0, entries.cols), site == Site::h1 ? moments_.h1 : moments_.h3, pool_);
  }

 private:
  void add_heads(Mat entries) {
    const int64_t group = config_.heads / config_.kv_heads;
    for (int64_t head = 0; head < config_.heads; ++head) {
      add_second_moment(widened(entries, head * config_.head_dim, config_.head_dim),
                        moments_.heads[static_cast<size_t>(head / group)], pool_);
    }
  }
  static Matrix widened(Mat m, int64_t first, int64_t count) {
    Matrix x(m.rows, count);
    for (int64_t t = 0; t < m.rows; ++t) std::copy_n(m.row(t) + first, count, x.row(t));
    return x;
  }

  const ModelConfig& config_;
  Backend& backend_;
  ThreadPool& pool_;
  const Wants& wants_;
  const Choice& choice_;
  Moments& moments_;
  std::vector<float> buffer_;
};

/// Adds what the groups read to their moments.
class ReadObserver : public Observer {
 public:
  ReadObserver(std::vector<Matrix>& moments, ThreadPool& pool) : moments_(moments), pool_(pool) {}
  void see(Site, Mat, Mat) override {}
  void read(size_t group, Mat entries) override { add_second_moment(entries, moments_[group], pool_); }

 private:
  std::vector<Matrix>& moments_;
  ThreadPool& pool_;
};

class MagnitudeObserver : public Observer {
 public:
  MagnitudeObserver(const Layer& layer, LayerMagnitudes& magnitudes)
      : layer_(layer), magnitudes_(magnitudes) {
    magnitudes_.scores.resize(layer.groups.size());
  }
  void see(Site site, Mat entries, Mat) override {
    magnitudes_.sites[static_cast<size_t>(site)].add(entries);
    for (size_t g = 0; g < layer_.groups.size(); ++g) {
      const float* scale = layer_.groups[g].scale;
      if (scale && site_of(layer_.plan.groups[g].projections[0]) == site)
        magnitudes_.scores[g].add(entries, scale);
    }
  }
  void see_neurons(Mat a) override { magnitudes_.neurons.add(a); }

 private:
  const Layer& layer_;
  LayerMagnitudes& magnitudes_;
};

/// The layer in place, wherever the decoder leaves its result.
void run_layer(Decoder& decoder, const Layer& layer, int64_t l, KvCache& cache, int64_t pos, Mat rows,
               const Pass& pass) {
  const Mat last = decoder.layer(layer, l, cache, 0, pos, rows, pass);
  if (last.data != rows.data) std::copy_n(last.data, rows.rows * rows.cols, rows.data);
}

double distance(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
  }
  return sum;
}

}  // namespace

Trial::Trial(Layer& layer, int64_t l, const ModelConfig& config, Backend& backend, Decoder& decoder,
             std::vector<float> rows, int64_t window)
    : layer_(layer),
      index_(l),
      config_(config),
      backend_(backend),
      decoder_(decoder),
      rows_(std::move(rows)),
      window_(window) {
  CHECK(window_ <= decoder_.max_rows());
  dense_ = run(Pass{true, nullptr});
  moved_ = rows_;
  const int64_t tokens = static_cast<int64_t>(rows_.size()) / config_.dim;
  for (const Adapter* adapter : {&layer_.middle, &layer_.adapter}) {
    if (!*adapter) continue;
    std::vector<float> from = moved_;
    decoder_.adapt(*adapter, Mat(from.data(), tokens, config_.dim), Mat(moved_.data(), tokens, config_.dim));
  }
}

std::vector<float> Trial::run(const Pass& pass) {
  std::vector<float> out = rows_;
  const auto cache = backend_.make_kv_cache({1, config_.kv_heads, config_.head_dim, window_, DType::f32});
  const Mat all(out.data(), static_cast<int64_t>(out.size()) / config_.dim, config_.dim);
  for (int64_t first = 0; first < all.rows; first += window_)
    run_layer(decoder_, layer_, index_, *cache, 0, all.slice(first, window_), pass);
  return out;
}

LayerError Trial::error(const LayerPlan& plan) {
  throw_if_interrupted();
  CHECK(plan.groups.size() == layer_.groups.size());
  LayerPlan kept = std::exchange(layer_.plan, plan);
  const std::vector<float> found = run(Pass{});
  layer_.plan = std::move(kept);
  LayerError error;
  const std::vector<float> zero(static_cast<size_t>(config_.dim));
  const int64_t tokens = static_cast<int64_t>(rows_.size()) / config_.dim;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* dense = dense_.data() + t * config_.dim;
    const double off = distance(found.data() + t * config_.dim, dense, config_.dim);
    const double size = distance(dense, zero.data(), config_.dim);
    error.absolute += off / static_cast<double>(tokens);
    const double added = distance(dense, moved_.data() + t * config_.dim, config_.dim);
    if (size > 0) error.relative += off / size / static_cast<double>(tokens);
    if (added > 0) error.update += off / added / static_cast<double>(tokens);
  }
  return error;
}

Calibration::Calibration(const OuterWeights& outer, const ModelConfig& config, Backend& backend,
                         ThreadPool& pool, std::span<const int32_t> tokens, int64_t window)
    : config_(config),
      backend_(backend),
      pool_(pool),
      decoder_(config, backend, std::min(window, Decoder::kBatch)),
      window_(window),
      windows_(static_cast<int64_t>(tokens.size()) / window),
      stream_(tokens.size() * static_cast<size_t>(config.dim)) {
  const Mat x(stream_.data(), static_cast<int64_t>(tokens.size()), config.dim);
  for (int64_t first = 0; first < x.rows; first += decoder_.max_rows()) {
    const int64_t count = std::min(decoder_.max_rows(), x.rows - first);
    decoder_.embed(outer, tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
                   x.slice(first, count));
  }
}

void Calibration::walk_window(const Layer& layer, int64_t l, const Pass& pass, Mat rows) {
  const auto cache = backend_.make_kv_cache({1, config_.kv_heads, config_.head_dim, window_, DType::f32});
  for (int64_t first = 0; first < window_; first += decoder_.max_rows()) {
    const int64_t count = std::min(decoder_.max_rows(), window_ - first);
    run_layer(decoder_, layer, l, *cache, first, rows.slice(first, count), pass);
  }
}

void Calibration::walk(const Layer& layer, int64_t l, const Pass& pass, const std::function<void()>& tick) {
  const Mat stream(stream_.data(), windows_ * window_, config_.dim);
  for (int64_t w = 0; w < windows_; ++w) {
    walk_window(layer, l, pass, stream.slice(w * window_, window_));
    tick();
  }
}

Moments Calibration::moments(const Layer& layer, int64_t l, const Wants& wants, const Choice& choice,
                             const std::function<void()>& tick) {
  Moments moments;
  if (!wants.moments) {
    walk(layer, l, Pass{true, nullptr}, tick);
    return moments;
  }
  if (wants.stream) moments.h1 = Matrix(config_.dim, config_.dim);
  if (wants.stream && choice.source != Source::h1) moments.h3 = Matrix(config_.dim, config_.dim);
  if (wants.heads)
    moments.heads.assign(static_cast<size_t>(config_.kv_heads), Matrix(config_.head_dim, config_.head_dim));
  MomentObserver observer(config_, backend_, pool_, wants, choice, moments);
  walk(layer, l, Pass{true, &observer}, tick);
  return moments;
}

std::vector<Matrix> Calibration::read_moments(const Layer& layer, int64_t l,
                                              const std::function<void()>& tick) {
  std::vector<Matrix> moments;
  for (const Group& group : layer.plan.groups) {
    const int64_t width = projection_in(config_, group.projections[0]);
    moments.emplace_back(width, width);
  }
  ReadObserver observer(moments, pool_);
  observe(layer, l, Pass{false, &observer}, tick);
  return moments;
}

void Calibration::observe(const Layer& layer, int64_t l, const Pass& pass,
                          const std::function<void()>& tick) {
  scratch_.resize(static_cast<size_t>(window_ * config_.dim));
  for (int64_t w = 0; w < windows_; ++w) {
    std::copy_n(stream_.data() + w * window_ * config_.dim, window_ * config_.dim, scratch_.data());
    walk_window(layer, l, pass, Mat(scratch_.data(), window_, config_.dim));
    tick();
  }
}

LayerMagnitudes Calibration::magnitudes(const Layer& layer, int64_t l, const Pass& pass) {
  LayerMagnitudes magnitudes;
  MagnitudeObserver observer(layer, magnitudes);
  observe(layer, l, Pass{pass.dense, &observer}, throw_if_interrupted);
  return magnitudes;
}

Trial Calibration::trial(Layer& layer, int64_t l) {
  const int64_t window = std::min(window_, Trial::kWindow), windows = std::min(windows_, Trial::kWindows);
  std::vector<float> rows;
  for (int64_t w = 0; w < windows; ++w) {
    const auto first = stream_.begin() + w * (windows_ / windows) * window_ * config_.dim;
    rows.insert(rows.end(), first, first + window * config_.dim);
  }
  return Trial(layer, l, config_, backend_, decoder_, std::move(rows), window);
}

void Calibration::turn(const Matrix& basis) {
  std::vector<float> narrow(basis.data.begin(), basis.data.end());
  const Weight weight{narrow.data(), nullptr, DType::f32, Layout::channels, basis.rows, basis.cols};
  scratch_.resize(static_cast<size_t>(window_ * config_.dim));
  for (int64_t w = 0; w < windows_; ++w) {
    const Mat rows(stream_.data() + w * window_ * config_.dim, window_, config_.dim);
    backend_.rotate(rows, weight, Mat(scratch_.data(), window_, config_.dim));
    std::copy(scratch_.begin(), scratch_.end(), rows.data);
  }
}

}  // namespace larosa
