#include "model/decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "base/error.h"

namespace larosa {

/// What one layer's pass over some rows needs to know.
struct Decoder::Step {
  const Layer& layer;
  const Pass& pass;
  std::array<Mat, 7> out;  // where each projection's result goes
  Mat stream;              // what o and down add to
  int64_t index;           // of the layer in the model, for the tally
};

Decoder::Decoder(const ModelConfig& config, Backend& backend, int64_t max_rows)
    : config_(config), backend_(backend), frequencies_(config.inv_freq()), max_rows_(max_rows) {
  const int64_t widest = std::max({config.dim, config.q_dim(), config.ffn});
  const int64_t cols[] = {config.dim,     config.q_dim(), config.kv_dim(), config.kv_dim(),
                          config.q_dim(), config.ffn,     config.ffn,      config.ffn,
                          config.dim,     config.dim,     widest,          widest};
  Mat* const mats[] = {&h_, &q_, &k_, &v_, &att_, &gate_, &up_, &mid_, &x_, &next_, &turned_, &back_};
  int64_t total = 0;
  for (int64_t c : cols) total += c;
  constexpr int64_t kFloat = sizeof(float);
  memory_ = backend.allocate(total * max_rows * kFloat);
  inv_freq_ = backend.upload(frequencies_.data(), static_cast<int64_t>(frequencies_.size()) * kFloat);
  auto* next = static_cast<float*>(memory_.get());
  for (size_t i = 0; i < std::size(cols); ++i) {
    *mats[i] = Mat(next, max_rows, cols[i]);
    next += max_rows * cols[i];
  }
  kept_ = backend.make_selection(max_rows, widest);
}

Decoder::~Decoder() = default;

void Decoder::embed(const OuterWeights& outer, std::span<const int32_t> tokens, Mat x) {
  backend_.embed(outer.embed, tokens, x);
}

void Decoder::select(const Rule& rule, const float* scale, Mat entries) {
  if (rule.select == Select::topk) {
    backend_.topk(entries, scale, rule.keep, *kept_);
  } else {
    backend_.threshold(entries, scale, rule.cut, *kept_);
  }
}

/// What was kept of the site's rows, divided by the length of each; room: as large as these. A row of zeros
/// stays one.
void Decoder::rescale(Site site, Mat room) {
  constexpr float kTiny = std::numeric_limits<float>::min();
  auto& [gain, memory] = unit_gains_[static_cast<size_t>(site)];
  if (!memory) {
    gain.assign(static_cast<size_t>(room.cols), 1 / std::sqrt(static_cast<float>(room.cols)));
    memory = backend_.upload(gain.data(), room.cols * static_cast<int64_t>(sizeof(float)));
  }
  backend_.expand(*kept_, room);
  backend_.rms_norm(room, static_cast<const float*>(memory.get()), kTiny, room);
  backend_.threshold(room, nullptr, 0, *kept_);  // the same entries: what was dropped is zero
}

/// What the group's rule has dropped, through its low-rank products.
void Decoder::add_low_rank(const Step& step, size_t group, Mat entries) {
  const Group& plan = step.layer.plan.groups[group];
  const Mat dropped(turned_.data, entries.rows, entries.cols), low(back_.data, entries.rows, plan.rank);
  backend_.expand_dropped(*kept_, entries, dropped);
  for (size_t i = 0; i < plan.projections.size(); ++i) {
    const LowRank& weights = step.layer.groups[group].low[i];
    const Product in{weights.in, low, false};
    const Product out{weights.out, step.out[static_cast<size_t>(plan.projections[i])], true};
    backend_.matmul(dropped, std::span(&in, 1));
    backend_.matmul(low, std::span(&out, 1));
  }
}

/// `up` for the neurons that the layer's rule keeps, zero for the others; entries: what up reads.
void Decoder::choose_neurons(const Step& step, Mat entries) {
  const Rule& rule = step.layer.plan.neurons;
  const bool chosen = rule.select != Select::all && !step.pass.dense;
  if (!chosen && !step.pass.observer) return;
  const Mat gate = step.out[static_cast<size_t>(Projection::gate)];
  const Mat a(turned_.data, gate.rows, gate.cols);
  backend_.activate(gate, config_.activation, a);
  if (step.pass.observer) step.pass.observer->see_neurons(a);
  if (!chosen) return;
  select(rule, nullptr, a);
  const Product product{step.layer.weights[Projection::up], step.out[static_cast<size_t>(Projection::up)],
                        false};
  backend_.matmul_outputs(entries, *kept_, product);
  if (!step.pass.tally) return;
  // Of `up` the same share of its weights as channels that were read.
  step.pass.tally->kept[static_cast<size_t>(step.index)][static_cast<size_t>(Projection::up)] +=
      backend_.count(*kept_) * entries.cols / a.cols;
}

/// The interpreter of the plan: every group of projections that reads `site`, thinned by its rule.
void Decoder::apply(const Step& step, Site site, Mat entries) {
  if (step.pass.observer) {
    const bool normalised = site == Site::h1 || site == Site::h3;
    step.pass.observer->see(site, entries, normalised ? step.stream : Mat());
  }
  const auto observe = [&](size_t group, Mat read) {
    if (step.pass.observer) step.pass.observer->read(group, read);
  };
  const bool chosen = step.layer.plan.neurons.select != Select::all && !step.pass.dense;
  const auto count = [&](const Group& group, int64_t kept) {
    if (!step.pass.tally) return;
    for (const Projection p : group.projections) {
      if (chosen && p == Projection::up) continue;  // choose_neurons
      step.pass.tally->kept[static_cast<size_t>(step.index)][static_cast<size_t>(p)] += kept;
    }
  };
  const Layer& layer = step.layer;
  for (size_t g = 0; g < layer.plan.groups.size(); ++g) {
    const Group& group = layer.plan.groups[g];
    if (site_of(group.projections[0]) != site) continue;
    std::array<Product, 7> storage;
    size_t n = 0;
    for (Projection p : group.projections) {
      if (chosen && p == Projection::up) continue;  // choose_neurons
      const bool residual = p == Projection::wo || p == Projection::down;
      storage[n++] = {layer.weights[p], step.out[static_cast<size_t>(p)], residual};
    }
    const std::span<const Product> products(storage.data(), n);
    const Rule& rule = group.rule;
    if ((step.pass.dense && !rule.trained) || rule.select == Select::all) {
      observe(g, entries);
      count(group, entries.rows * entries.cols);
      if (n > 0) backend_.matmul(entries, products);
      continue;
    }
    Mat vector = entries;
    const Mat turned(turned_.data, entries.rows, entries.cols);
    if (rule.rotated) {
      backend_.rotate(entries, layer.groups[g].basis, turned);
      vector = turned;
    }
    select(rule, layer.groups[g].scale, vector);
    if (step.pass.tally) count(group, backend_.count(*kept_));
    if (!rule.rotated) {
      if (rule.rescaled) rescale(site, turned);
      if (step.pass.observer) {
        backend_.expand(*kept_, turned);
        observe(g, turned);
      }
      backend_.sparse_matmul(*kept_, products);
      if (group.rank > 0) add_low_rank(step, g, entries);
      continue;
    }
    const Mat back(back_.data, entries.rows, entries.cols);
    Weight transposed = layer.groups[g].basis;  // the same numbers read as rows: B Bᵀ = 1
    transposed.layout = Layout::rows;
    backend_.expand(*kept_, turned);
    backend_.rotate(turned, transposed, back);
    observe(g, back);
    backend_.matmul(back, products);
  }
}

Mat Decoder::layer(const Layer& layer, int64_t index, KvCache& cache, int64_t cache_layer,
                   std::span<const Segment> segments, Mat x, const Pass& pass) {
  CHECK(x.rows <= max_rows_);
  const int64_t rows = x.rows;
  const auto view = [rows](const Mat& m) { return Mat(m.data, rows, m.cols); };
  const Mat h = view(h_), q = view(q_), k = view(k_), v = view(v_), att = view(att_), gate = view(gate_),
            up = view(up_), mid = view(mid_);
  Step step{layer, pass, {q, k, v, x, gate, up, x}, x, index};
  const LayerWeights& w = layer.weights;
  Mat spare = view(x.data == x_.data ? next_ : x_);
  // A change of basis turns the skip path alone, and the projection behind it adds in the new basis: so it
  // needs not wait for what that projection reads. It stands right before that projection because a backend
  // may do both in one (cuda).
  const auto turn = [&](const Adapter& adapter) {
    if (!adapter) return;
    adapt(adapter, step.stream, spare);
    std::swap(step.stream, spare);
    step.out[static_cast<size_t>(Projection::wo)] = step.out[static_cast<size_t>(Projection::down)] =
        step.stream;
  };

  backend_.rms_norm(x, w.norm_attn, config_.norm_eps, h);
  apply(step, Site::h1, h);
  if (w.norm_q) {
    const Mat q_heads(q.data, rows * config_.heads, config_.head_dim);
    const Mat k_heads(k.data, rows * config_.kv_heads, config_.head_dim);
    backend_.rms_norm(q_heads, w.norm_q, config_.norm_eps, q_heads);
    backend_.rms_norm(k_heads, w.norm_k, config_.norm_eps, k_heads);
  }
  int64_t first = 0;
  for (const auto& [count, pos] : segments) {
    const Mat qs = q.slice(first, count), ks = k.slice(first, count);
    backend_.rope(qs, ks, config_.head_dim, pos, static_cast<const float*>(inv_freq_.get()));
    backend_.attend(qs, ks, v.slice(first, count), cache, cache_layer, pos, config_.window_of(index),
                    att.slice(first, count));
    first += count;
  }
  CHECK(first == rows);
  turn(layer.middle);
  apply(step, Site::h2, att);

  backend_.rms_norm(step.stream, w.norm_mlp, config_.norm_eps, h);
  apply(step, Site::h3, h);
  choose_neurons(step, h);
  backend_.glu(gate, up, config_.activation, mid);
  turn(layer.adapter);
  apply(step, Site::h4, mid);
  return step.stream;
}

void Decoder::adapt(const Adapter& adapter, Mat x, Mat next) {
  backend_.rotate(x, adapter.weight, next);
  if (!adapter.top) return;
  backend_.rotate(Mat(x.data, x.rows, adapter.top.in, x.stride), adapter.top, next, true);
}

/// forward for at most max_rows rows.
void Decoder::run(const Model& model, std::span<const int32_t> tokens, KvCache& cache,
                  std::span<const Segment> segments, const Pass& pass, Mat hidden) {
  const auto rows = static_cast<int64_t>(tokens.size());
  Mat x(x_.data, rows, config_.dim);
  embed(model.outer, tokens, x);
  if (pass.tally) {
    pass.tally->kept.resize(static_cast<size_t>(config_.layers));
    pass.tally->rows += rows;
  }
  for (int64_t l = 0; l < config_.layers; ++l) {
    x = layer(model.layers[static_cast<size_t>(l)], l, cache, l, segments, x, pass);
  }
  backend_.rms_norm(x, model.outer.norm_out, config_.norm_eps, hidden);
}

void Decoder::forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache, int64_t pos,
                      const Pass& pass, Mat hidden) {
  for (size_t first = 0; first < tokens.size();) {
    const size_t count = std::min(tokens.size() - first, static_cast<size_t>(max_rows_));
    const int64_t offset = static_cast<int64_t>(first);
    const Segment segment{static_cast<int64_t>(count), pos + offset};
    run(model, tokens.subspan(first, count), cache, std::span(&segment, 1), pass,
        hidden.slice(offset, segment.rows));
    first += count;
  }
}

void Decoder::forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache,
                      std::span<const Segment> segments, const Pass& pass, Mat hidden) {
  std::vector<Segment> part;
  int64_t done = 0, rows = 0;  // run, and waiting in `part`
  const auto run_part = [&] {
    run(model, tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(rows)), cache, part, pass,
        hidden.slice(done, rows));
    done += rows;
    rows = 0;
    part.clear();
  };
  for (Segment s : segments) {
    while (s.rows > 0) {
      const int64_t count = std::min(s.rows, max_rows_ - rows);
      part.push_back({count, s.pos});
      rows += count;
      s.rows -= count;
      s.pos += count;
      if (rows == max_rows_) run_part();
    }
  }
  if (rows > 0) run_part();
  CHECK(done == static_cast<int64_t>(tokens.size()));
}

void Decoder::logits(const Model& model, Mat hidden, Mat logits) {
  const Product product{model.outer.head, logits, false};
  backend_.matmul(hidden, std::span(&product, 1));
}

}  // namespace larosa
