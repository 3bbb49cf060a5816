#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "backend/backend.h"
#include "base/error.h"
#include "base/quant.h"

namespace larosa {
namespace {

std::string layer_name(int64_t l, const std::string& name) {
  return "layers." + std::to_string(l) + "." + name;
}

/// A weight of a larosa directory: (in, out) channels, or (out, in) rows.
Weight plain_weight(const Checkpoint& checkpoint, const std::string& name, int64_t in, int64_t out,
                    Layout layout) {
  const Weight w{nullptr, nullptr, DType::f32, layout, in, out};
  const int64_t shape[2] = {w.lines(), w.line_length()};
  const Tensor tensor = checkpoint.get(name, shape);
  if (tensor.dtype == DType::f64)
    fail(checkpoint.file_of(name), ": tensor ", name, ": dtype F64 is not supported here");
  return Weight{tensor.data, nullptr, tensor.dtype, layout, in, out};
}

/// The same or, where the file holds plain bytes, quantised lines: their length says which type.
Weight stored_weight(const Checkpoint& checkpoint, const std::string& name, int64_t in, int64_t out,
                     Layout layout) {
  const auto bytes = checkpoint.find_bytes(name);
  if (!bytes) return plain_weight(checkpoint, name, in, out, layout);
  std::string expected;
  for (const DType t : {DType::int8, DType::int4}) {
    const Weight w{bytes->data, nullptr, t, layout, in, out};
    const std::vector<int64_t> shape = {w.lines(), w.line_bytes()};
    if (bytes->shape == shape) return w;
    expected += (expected.empty() ? "" : " or ") + shape_text(shape) + " (" + dtype_name(t) + ")";
  }
  fail(checkpoint.file_of(name), ": tensor ", name, ": shape of U8 is ", shape_text(bytes->shape),
       ", expected ", expected);
}

Adapter stored_adapter(const Checkpoint& checkpoint, const ModelConfig& config, const std::string& name) {
  Adapter adapter;
  adapter.weight = stored_weight(checkpoint, name, config.dim, config.dim, Layout::channels);
  if (quantised(adapter.weight.dtype))
    adapter.top = plain_weight(checkpoint, name + ".top", std::min(kAdapterTop, config.dim), config.dim,
                               Layout::channels);
  return adapter;
}

const float* stored_vector(const Checkpoint& checkpoint, const std::string& name, int64_t n,
                           std::vector<std::unique_ptr<float[]>>& owned) {
  return widen(checkpoint.get(name, std::span(&n, 1)), owned);
}

const float* optional_vector(const Checkpoint& checkpoint, const std::string& name, int64_t n,
                             std::vector<std::unique_ptr<float[]>>& owned) {
  return checkpoint.find(name) ? stored_vector(checkpoint, name, n, owned) : nullptr;
}

void load_stored(Model& model, const std::string& dir) {
  const Checkpoint& checkpoint = *model.checkpoint;
  const ModelConfig& config = model.config;
  const auto& metadata = checkpoint.metadata();
  const auto plan = metadata.find("larosa.plan");
  if (plan == metadata.end()) fail(dir, ": no tensor file carries a plan (metadata larosa.plan)");
  model.plan = plan_from_json(plan->second, dir);
  validate(model.plan, plan_shape(config), dir);
  const auto source = metadata.find("larosa.fingerprint");
  if (source == metadata.end() || source->second != model.plan.fingerprint) {
    fail(dir, ": the plan was made for another model (fingerprint ", model.plan.fingerprint,
         ", the tensors say ", source == metadata.end() ? "nothing" : source->second, ")");
  }
  model.outer = load_stored_outer(checkpoint, config);
  for (int64_t l = 0; l < config.layers; ++l) {
    model.layers.push_back(
        load_stored_layer(checkpoint, config, model.plan.layers[static_cast<size_t>(l)], l));
  }
}

}  // namespace

Layer load_stored_layer(const Checkpoint& checkpoint, const ModelConfig& config, const LayerPlan& plan,
                        int64_t l) {
  Layer layer;
  layer.plan = plan;
  LayerWeights& w = layer.weights;
  for (Projection p : kProjections) {
    const std::string name = layer_name(l, projection_name(p));
    w[p] = stored_weight(checkpoint, name, projection_in(config, p), projection_out(config, p),
                         stored_layout(plan, p));
    const bool biased = (site_of(p) == Site::h1 && config.bias_qkv) || (p == Projection::wo && config.bias_o);
    if (biased) w[p].bias = stored_vector(checkpoint, name + ".bias", w[p].out, w.owned);
  }
  w.norm_attn = optional_vector(checkpoint, layer_name(l, "norm_attn"), config.dim, w.owned);
  w.norm_mlp = optional_vector(checkpoint, layer_name(l, "norm_mlp"), config.dim, w.owned);
  if (config.qk_norm) {
    w.norm_q = stored_vector(checkpoint, layer_name(l, "norm_q"), config.head_dim, w.owned);
    w.norm_k = stored_vector(checkpoint, layer_name(l, "norm_k"), config.head_dim, w.owned);
  }
  if (plan.middle) layer.middle = stored_adapter(checkpoint, config, layer_name(l, "middle"));
  if (plan.adapter) layer.adapter = stored_adapter(checkpoint, config, layer_name(l, "adapter"));
  for (const Group& group : plan.groups) {
    GroupData data;
    const std::string name = layer_name(l, projection_name(group.projections[0]));
    const int64_t width = projection_in(config, group.projections[0]);
    if (group.rule.scaled) data.scale = stored_vector(checkpoint, name + ".scale", width, w.owned);
    if (group.rule.rotated)
      data.basis = plain_weight(checkpoint, name + ".basis", width, width, Layout::channels);
    for (const Projection p : group.projections) {
      if (group.rank == 0) break;
      const std::string low = layer_name(l, projection_name(p)) + ".low_";
      const Layout layout = low_in_layout(checkpoint.find_bytes(low + "in").has_value());
      data.low.push_back(
          {stored_weight(checkpoint, low + "in", width, group.rank, layout),
           stored_weight(checkpoint, low + "out", group.rank, projection_out(config, p), Layout::channels)});
    }
    layer.groups.push_back(data);
  }
  return layer;
}

OuterWeights load_stored_outer(const Checkpoint& checkpoint, const ModelConfig& config) {
  OuterWeights outer;
  outer.embed = stored_weight(checkpoint, "embed", config.dim, config.vocab, Layout::rows);
  outer.head =
      config.tied ? outer.embed : stored_weight(checkpoint, "head", config.dim, config.vocab, Layout::rows);
  outer.norm_out = optional_vector(checkpoint, "norm_out", config.dim, outer.owned);
  return outer;
}

bool is_larosa_dir(const std::string& dir) {
  std::ifstream file(std::filesystem::path(dir) / "config.json");
  const nlohmann::json config = nlohmann::json::parse(file, nullptr, false);
  return config.is_object() && config.contains("larosa");
}

Model load_model(const std::string& dir) {
  Model model;
  model.config = load_config(dir);
  model.checkpoint = Checkpoint::open(dir);
  if (is_larosa_dir(dir)) {
    load_stored(model, dir);
    return model;
  }
  const LayerPlan plan = trained_layer(model.config);
  model.plan.method = "dense";
  model.plan.form = "folded";
  model.outer = load_outer(*model.checkpoint, model.config);
  for (int64_t l = 0; l < model.config.layers; ++l) {
    Layer layer;
    layer.plan = plan;
    layer.weights = load_layer(*model.checkpoint, model.config, l);
    layer.groups.resize(layer.plan.groups.size());
    model.plan.layers.push_back(layer.plan);
    model.layers.push_back(std::move(layer));
  }
  return model;
}

LayerPlan trained_layer(const ModelConfig& config) {
  LayerPlan layer = dense_layer();
  if (config.activation.rests()) layer.neurons.select = Select::threshold;
  for (Group& group : layer.groups) {
    const bool reads_neurons = group.projections[0] == Projection::down;
    if (config.sparse_ratio > 0) {
      group.rule.select = Select::topk;
      group.rule.keep = config.trained_keep(projection_in(config, group.projections[0]));
      group.rule.trained = true;
      group.rule.rescaled = config.sparse_rescale;
    } else if (reads_neurons && config.activation.rests()) {
      group.rule.select = Select::threshold;
    }
  }
  if (config.sparse_ratio > 0) layer.neurons = {};  // up reads a thinned input
  return layer;
}

Layout stored_layout(const LayerPlan& plan, Projection p) {
  const bool by_outputs = p == Projection::up && plan.neurons.select != Select::all;
  return by_outputs ? Layout::rows : Layout::channels;
}

const Weight* find_quantised(const Model& model, const Tensor& tensor) {
  const auto same = [&](const Weight& w) { return w.data == tensor.data && quantised(w.dtype); };
  for (const Weight* w : {&model.outer.embed, &model.outer.head})
    if (same(*w)) return w;
  for (const Layer& layer : model.layers) {
    for (const Weight& w : layer.weights.projection)
      if (same(w)) return &w;
    for (const Adapter* adapter : {&layer.middle, &layer.adapter})
      if (same(adapter->weight)) return &adapter->weight;
    for (const GroupData& group : layer.groups) {
      for (const LowRank& low : group.low) {
        if (same(low.in)) return &low.in;
        if (same(low.out)) return &low.out;
      }
    }
  }
  return nullptr;
}

void check_finite(const Model& model) {
  const Checkpoint& checkpoint = *model.checkpoint;
  checkpoint.check_finite();
  for (const std::string& name : checkpoint.names()) {
    const auto bytes = checkpoint.find_bytes(name);
    const Weight* w = bytes ? find_quantised(model, *bytes) : nullptr;
    if (!w) continue;
    const int64_t group = quant_group(w->dtype);
    for (int64_t line = 0; line < w->lines(); ++line) {
      for (int64_t i = 0; i < w->line_length(); i += group) {
        const float scale = read_scale(w->line(line), w->dtype, w->line_length(), i);
        if (!std::isfinite(scale))
          fail(checkpoint.file_of(name), ": tensor ", name, ": scale ", i / group, " of line ", line, " is ",
               scale);
      }
    }
    checkpoint.release(*bytes);
  }
}

namespace {

/// Uploads tensors, each once.
class Placer {
 public:
  Placer(Backend& backend, std::vector<std::shared_ptr<const void>>& placed)
      : backend_(backend), placed_(placed) {}

  void vector(const float*& data, int64_t n) {
    data = static_cast<const float*>(at(data, n * static_cast<int64_t>(sizeof(float))));
  }
  void weight(Weight& w) {
    w.data = at(w.data, w.bytes());
    vector(w.bias, w.out);
  }
  void layer(Layer& layer, const ModelConfig& c) {
    LayerWeights& w = layer.weights;
    for (Weight& projection : w.projection) weight(projection);
    vector(w.norm_attn, c.dim);
    vector(w.norm_mlp, c.dim);
    vector(w.norm_q, c.head_dim);
    vector(w.norm_k, c.head_dim);
    for (size_t g = 0; g < layer.groups.size(); ++g) {
      vector(layer.groups[g].scale, w[layer.plan.groups[g].projections[0]].in);
      weight(layer.groups[g].basis);
      for (LowRank& low : layer.groups[g].low) {
        weight(low.in);
        weight(low.out);
      }
    }
    for (Adapter* adapter : {&layer.middle, &layer.adapter}) {
      weight(adapter->weight);
      weight(adapter->top);
    }
  }

 private:
  const void* at(const void* data, int64_t bytes) {
    if (!data) return nullptr;
    const auto [entry, fresh] = places_.try_emplace(data);
    if (fresh) {
      placed_.push_back(backend_.upload(data, bytes));
      entry->second = placed_.back().get();
    }
    return entry->second;
  }

  Backend& backend_;
  std::vector<std::shared_ptr<const void>>& placed_;
  std::map<const void*, const void*> places_;
};

}  // namespace

void place(Model& model, Backend& backend) {
  Placer placer(backend, model.placed);
  for (Layer& layer : model.layers) placer.layer(layer, model.config);
  placer.weight(model.outer.embed);
  placer.weight(model.outer.head);
  placer.vector(model.outer.norm_out, model.config.dim);
}

std::vector<std::shared_ptr<const void>> place(Layer& layer, const ModelConfig& config, Backend& backend) {
  std::vector<std::shared_ptr<const void>> placed;
  Placer(backend, placed).layer(layer, config);
  return placed;
}

PlanShape plan_shape(const ModelConfig& config) {
  PlanShape shape;
  shape.layers = config.layers;
  for (Projection p : kProjections) {
    shape.site_dim[static_cast<size_t>(site_of(p))] = projection_in(config, p);
    shape.projection_weights[static_cast<size_t>(p)] = projection_in(config, p) * projection_out(config, p);
  }
  return shape;
}

namespace {

/// Bytes of a projection that a token reads; thresholds by what is expected of them, where that is known.
int64_t projection_bytes(const LayerPlan& plan, const Rule& rule, Projection p, const Weight& w) {
  if (rule.select != Select::all && rule.keep > 0 && !rule.rotated) return rule.keep * w.line_bytes();
  const int64_t neurons = plan.neurons.select != Select::all ? plan.neurons.keep : 0;
  const bool by_neurons = p == Projection::up || (p == Projection::down && rule.select == Select::threshold);
  return neurons > 0 && by_neurons ? neurons * w.line_bytes() : w.bytes();
}

}  // namespace

TokenBytes token_bytes(const Model& model, DType kv) {
  const ModelConfig& c = model.config;
  TokenBytes bytes;
  for (const Layer& layer : model.layers) {
    for (size_t g = 0; g < layer.plan.groups.size(); ++g) {
      const Group& group = layer.plan.groups[g];
      for (Projection p : group.projections) {
        const Weight& w = layer.weights[p];
        bytes.projections_dense += w.bytes();
        bytes.projections += projection_bytes(layer.plan, group.rule, p, w);
        if (w.bias) bytes.outer += w.out * 4;
      }
      if (group.rule.scaled) bytes.thinning += layer.weights[group.projections[0]].in * 4;
      if (group.rule.rotated) bytes.thinning += 2 * layer.groups[g].basis.bytes();
      for (const LowRank& low : layer.groups[g].low) bytes.low_rank += low.in.bytes() + low.out.bytes();
    }
    bytes.adapters += layer.middle.bytes() + layer.adapter.bytes();
    bytes.outer += (layer.weights.norm_attn ? c.dim * 4 : 0) + (layer.weights.norm_mlp ? c.dim * 4 : 0) +
                   (layer.weights.norm_q ? 2 * c.head_dim * 4 : 0);
  }
  bytes.outer +=
      model.outer.head.bytes() + model.outer.embed.line_bytes() + (model.outer.norm_out ? c.dim * 4 : 0);
  const int64_t kv_of_layer = KvShape{1, c.kv_heads, c.head_dim, 0, kv}.bytes_per_token();
  bytes.kv_per_position = c.layers * kv_of_layer;
  bytes.window = c.window;
  for (int64_t l = 0; l < c.layers; ++l) bytes.kv_windowed += c.window_of(l) > 0 ? kv_of_layer : 0;
  return bytes;
}

int64_t model_bytes(const Model& model) {
  if (model.checkpoint) return model.checkpoint->bytes();
  int64_t total = model.outer.embed.bytes() +
                  (model.outer.head.data != model.outer.embed.data ? model.outer.head.bytes() : 0);
  for (const Layer& layer : model.layers) {
    for (const Weight& w : layer.weights.projection) total += w.bytes();
    total += layer.middle.bytes() + layer.adapter.bytes();
    for (const GroupData& group : layer.groups) {
      for (const LowRank& low : group.low) total += low.in.bytes() + low.out.bytes();
    }
  }
  return total;
}

int64_t parameter_count(const ModelConfig& c) {
  int64_t per_layer = layer_weights(c) + 2 * c.dim + (c.qk_norm ? 2 * c.head_dim : 0);
  if (c.bias_qkv) per_layer += c.q_dim() + 2 * c.kv_dim();
  if (c.bias_o) per_layer += c.dim;
  return c.vocab * c.dim * (c.tied ? 1 : 2) + c.layers * per_layer + c.dim;
}

}  // namespace larosa
