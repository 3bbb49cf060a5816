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
  MomentObserver(const ModelConfig& config, Backend& backend, Algebra& algebra, const Wants& wants,
                 const Choice& choice)
      : config_(config), backend_(backend), choice_(choice) {
    const auto moment = [&](int64_t d) { return algebra.make_moment(d, Precision::f64); };
    if (wants.stream) h1_ = moment(config.dim);
    if (wants.stream && choice.source != Source::h1) h3_ = moment(config.dim);
    for (int64_t g = 0; wants.heads && g < config.kv_heads; ++g) heads_.push_back(moment(config.head_dim));
  }

  void see(Site site, Mat entries, Mat stream) override {
    if (site == Site::h2 && !heads_.empty()) return add_heads(entries);
    Moment* const moment = site == Site::h1 ? h1_.get() : site == Site::h3 ? h3_.get() : nullptr;
    if (!moment) return;
    if (!choice_.after_gain) {  // the foldable form rotates the normalised stream before its gain
      if (buffer_.mat.rows < stream.rows) buffer_ = StoredRows(backend_, stream.rows, stream.cols);
      entries = buffer_.mat.slice(0, stream.rows);
      backend_.rms_norm(stream, nullptr, config_.norm_eps, entries);
    }
    moment->add(entries);
  }

  Moments take() {
    Moments moments;
    if (h1_) moments.h1 = h1_->take();
    if (h3_) moments.h3 = h3_->take();
    for (const auto& head : heads_) moments.heads.push_back(head->take());
    return moments;
  }

 private:
  void add_heads(Mat entries) {
    const int64_t group = config_.heads / config_.kv_heads, width = config_.head_dim;
    for (int64_t head = 0; head < config_.heads; ++head)
      heads_[static_cast<size_t>(head / group)]->add(
          Mat(entries.data + head * width, entries.rows, width, entries.stride));
  }

  const ModelConfig& config_;
  Backend& backend_;
  const Choice& choice_;
  std::unique_ptr<Moment> h1_, h3_;
  std::vector<std::unique_ptr<Moment>> heads_;
  StoredRows buffer_;
};

/// Adds what the groups read to their moments.
class ReadObserver : public Observer {
 public:
  ReadObserver(const ModelConfig& config, Algebra& algebra, const LayerPlan& plan) {
    for (const Group& group : plan.groups)
      moments_.push_back(algebra.make_moment(projection_in(config, group.projections[0]), Precision::f32));
  }
  void see(Site, Mat, Mat) override {}
  void read(size_t group, Mat entries) override { moments_[group]->add(entries); }

  std::vector<Matrix> take() {
    std::vector<Matrix> taken;
    for (const auto& moment : moments_) taken.push_back(moment->take());
    return taken;
  }

 private:
  std::vector<std::unique_ptr<Moment>> moments_;
};

class MagnitudeObserver : public Observer {
 public:
  MagnitudeObserver(const Layer& layer, Backend& backend, LayerMagnitudes& magnitudes)
      : layer_(layer), backend_(backend), magnitudes_(magnitudes) {
    magnitudes_.scores.resize(layer.groups.size());
    for (size_t g = 0; g < layer.groups.size(); ++g) {
      const int64_t width = layer.weights[layer.plan.groups[g].projections[0]].in;
      scales_.emplace_back();
      if (!layer.groups[g].scale) continue;
      scales_.back().resize(static_cast<size_t>(width));
      backend.read(Mat(const_cast<float*>(layer.groups[g].scale), 1, width), scales_.back().data());
    }
  }
  void see(Site site, Mat entries, Mat) override {
    const Mat rows = on_host(entries);
    magnitudes_.sites[static_cast<size_t>(site)].add(rows);
    for (size_t g = 0; g < layer_.groups.size(); ++g) {
      if (!scales_[g].empty() && site_of(layer_.plan.groups[g].projections[0]) == site)
        magnitudes_.scores[g].add(rows, scales_[g].data());
    }
  }
  void see_neurons(Mat a) override { magnitudes_.neurons.add(on_host(a)); }

 private:
  Mat on_host(Mat rows) {
    buffer_.resize(static_cast<size_t>(rows.rows * rows.cols));
    backend_.read(rows, buffer_.data());
    return {buffer_.data(), rows.rows, rows.cols};
  }

  const Layer& layer_;
  Backend& backend_;
  LayerMagnitudes& magnitudes_;
  std::vector<std::vector<float>> scales_;  // by group, empty where it has none
  std::vector<float> buffer_;
};

/// The layer in place, wherever the decoder leaves its result.
void run_layer(Decoder& decoder, Backend& backend, const Layer& layer, int64_t l, KvCache& cache, int64_t pos,
               Mat rows, const Pass& pass) {
  const Mat last = decoder.layer(layer, l, cache, 0, pos, rows, pass);
  if (last.data != rows.data) backend.copy(last, rows);
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
             StoredRows rows, int64_t window)
    : layer_(layer),
      index_(l),
      config_(config),
      backend_(backend),
      decoder_(decoder),
      rows_(std::move(rows)),
      out_(backend, rows_.mat.rows, config.dim),
      window_(window) {
  CHECK(window_ <= decoder_.max_rows());
  dense_ = run(Pass{true, nullptr});
  Mat moved = rows_.mat;
  StoredRows from, to;
  for (const Adapter* adapter : {&layer_.middle, &layer_.adapter}) {
    if (!*adapter) continue;
    from = std::move(to);
    to = StoredRows(backend, moved.rows, moved.cols);
    decoder_.adapt(*adapter, moved, to.mat);
    moved = to.mat;
  }
  const std::vector<float> start = read(moved), zero(static_cast<size_t>(config.dim));
  for (int64_t t = 0; t < moved.rows; ++t) {
    const float* dense = dense_.data() + t * config.dim;
    size_.push_back(distance(dense, zero.data(), config.dim));
    added_.push_back(distance(dense, start.data() + t * config.dim, config.dim));
  }
}

std::vector<float> Trial::read(Mat rows) {
  std::vector<float> values(static_cast<size_t>(rows.rows * rows.cols));
  backend_.read(rows, values.data());
  return values;
}

std::vector<float> Trial::run(const Pass& pass) {
  const auto cache = backend_.make_kv_cache({1, config_.kv_heads, config_.head_dim, window_, DType::f32});
  backend_.copy(rows_.mat, out_.mat);
  for (int64_t first = 0; first < out_.mat.rows; first += window_)
    run_layer(decoder_, backend_, layer_, index_, *cache, 0, out_.mat.slice(first, window_), pass);
  return read(out_.mat);
}

LayerError Trial::error(const LayerPlan& plan) {
  throw_if_interrupted();
  CHECK(plan.groups.size() == layer_.groups.size());
  LayerPlan kept = std::exchange(layer_.plan, plan);
  const std::vector<float> found = run(Pass{});
  layer_.plan = std::move(kept);
  LayerError error;
  const int64_t tokens = rows_.mat.rows;
  for (int64_t t = 0; t < tokens; ++t) {
    const double off = distance(found.data() + t * config_.dim, dense_.data() + t * config_.dim, config_.dim);
    const double size = size_[static_cast<size_t>(t)], added = added_[static_cast<size_t>(t)];
    error.absolute += off / static_cast<double>(tokens);
    if (size > 0) error.relative += off / size / static_cast<double>(tokens);
    if (added > 0) error.update += off / added / static_cast<double>(tokens);
  }
  return error;
}

Calibration::Calibration(const OuterWeights& outer, const ModelConfig& config, Backend& backend,
                         Algebra& algebra, std::span<const int32_t> tokens, int64_t window)
    : config_(config),
      backend_(backend),
      algebra_(algebra),
      decoder_(config, backend, std::min(window, Decoder::kBatch)),
      window_(window),
      windows_(static_cast<int64_t>(tokens.size()) / window),
      stream_(backend, static_cast<int64_t>(tokens.size()), config.dim) {
  OuterWeights placed;
  placed.embed = outer.embed;
  const auto table = backend.upload(outer.embed.data, outer.embed.bytes());
  placed.embed.data = table.get();
  const Mat x = stream_.mat;
  for (int64_t first = 0; first < x.rows; first += decoder_.max_rows()) {
    const int64_t count = std::min(decoder_.max_rows(), x.rows - first);
    decoder_.embed(placed, tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
                   x.slice(first, count));
  }
  backend.synchronize();
}

Mat Calibration::scratch() {
  if (!scratch_.memory) scratch_ = StoredRows(backend_, window_, config_.dim);
  return scratch_.mat;
}

void Calibration::walk_window(const Layer& layer, int64_t l, const Pass& pass, Mat rows) {
  const auto cache = backend_.make_kv_cache({1, config_.kv_heads, config_.head_dim, window_, DType::f32});
  for (int64_t first = 0; first < window_; first += decoder_.max_rows()) {
    const int64_t count = std::min(decoder_.max_rows(), window_ - first);
    run_layer(decoder_, backend_, layer, l, *cache, first, rows.slice(first, count), pass);
  }
}

void Calibration::walk(const Layer& layer, int64_t l, const Pass& pass, const std::function<void()>& tick) {
  for (int64_t w = 0; w < windows_; ++w) {
    walk_window(layer, l, pass, window(w));
    tick();
  }
}

Moments Calibration::moments(const Layer& layer, int64_t l, const Wants& wants, const Choice& choice,
                             const std::function<void()>& tick) {
  if (!wants.moments) {
    walk(layer, l, Pass{true, nullptr}, tick);
    return {};
  }
  MomentObserver observer(config_, backend_, algebra_, wants, choice);
  walk(layer, l, Pass{true, &observer}, tick);
  return observer.take();
}

std::vector<Matrix> Calibration::read_moments(const Layer& layer, int64_t l,
                                              const std::function<void()>& tick) {
  ReadObserver observer(config_, algebra_, layer.plan);
  observe(layer, l, Pass{false, &observer}, tick);
  return observer.take();
}

void Calibration::observe(const Layer& layer, int64_t l, const Pass& pass,
                          const std::function<void()>& tick) {
  for (int64_t w = 0; w < windows_; ++w) {
    backend_.copy(window(w), scratch());
    walk_window(layer, l, pass, scratch());
    tick();
  }
}

LayerMagnitudes Calibration::magnitudes(const Layer& layer, int64_t l, const Pass& pass) {
  LayerMagnitudes magnitudes;
  MagnitudeObserver observer(layer, backend_, magnitudes);
  observe(layer, l, Pass{pass.dense, &observer}, throw_if_interrupted);
  return magnitudes;
}

Trial Calibration::trial(Layer& layer, int64_t l) {
  const int64_t width = std::min(window_, Trial::kWindow), windows = std::min(windows_, Trial::kWindows);
  StoredRows rows(backend_, windows * width, config_.dim);
  for (int64_t w = 0; w < windows; ++w)
    backend_.copy(window(w * (windows_ / windows)).slice(0, width), rows.mat.slice(w * width, width));
  return Trial(layer, l, config_, backend_, decoder_, std::move(rows), width);
}

void Calibration::turn(const Matrix& basis) {
  const std::vector<float> narrow(basis.data.begin(), basis.data.end());
  const auto there = backend_.upload(narrow.data(), static_cast<int64_t>(narrow.size() * sizeof(float)));
  const Weight weight{there.get(), nullptr, DType::f32, Layout::channels, basis.rows, basis.cols};
  for (int64_t w = 0; w < windows_; ++w) {
    backend_.rotate(window(w), weight, scratch());
    backend_.copy(scratch(), window(w));
  }
  backend_.synchronize();
}

}  // namespace larosa
