#include "model/weights.h"

#include "base/error.h"

namespace larosa {
namespace {

std::string of_layer(const char* pattern, int64_t l) {
  std::string name = pattern;
  const size_t place = name.find("{}");
  if (place != std::string::npos) name.replace(place, 2, std::to_string(l));
  return name;
}

/// (out, in) as stored; the element types that projections may have.
Weight stored_rows(const Checkpoint& checkpoint, const std::string& name, int64_t in, int64_t out) {
  const int64_t shape[] = {out, in};
  const Tensor tensor = checkpoint.get(name, shape);
  if (tensor.dtype == DType::f64)
    fail(checkpoint.file_of(name), ": tensor ", name,
         ": dtype F64 is not supported here (F32, F16, BF16 are)");
  return Weight{tensor.data, nullptr, tensor.dtype, Layout::rows, in, out};
}

const float* stored_vector(const Checkpoint& checkpoint, const std::string& name, int64_t n,
                           std::vector<std::unique_ptr<float[]>>& owned) {
  return widen(checkpoint.get(name, std::span(&n, 1)), owned);
}

/// A tensor that the config gives no place in the arithmetic must not be there.
void expect_none(const Checkpoint& checkpoint, const std::string& name, const ModelConfig& config,
                 const char* why) {
  if (checkpoint.find(name)) {
    fail(checkpoint.file_of(name), ": tensor ", name, " is present, but config.json (model_type ",
         config.architecture, ") says ", why);
  }
}

bool biased(const ModelConfig& config, Projection p) {
  return (site_of(p) == Site::h1 && config.bias_qkv) || (p == Projection::wo && config.bias_o);
}

}  // namespace

const float* widen(const Tensor& tensor, std::vector<std::unique_ptr<float[]>>& owned) {
  const int64_t n = tensor.elements();
  auto values = std::make_unique<float[]>(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = load_element(tensor.data, tensor.dtype, i);
  owned.push_back(std::move(values));
  return owned.back().get();
}

LayerWeights load_layer(const Checkpoint& checkpoint, const ModelConfig& config, int64_t l) {
  const TensorNames& names = *find_architecture(config.architecture, "model").names;
  LayerWeights w;
  for (const Projection p : kProjections) {
    const std::string name = of_layer(names.projection[static_cast<size_t>(p)], l);
    w[p] = stored_rows(checkpoint, name + ".weight", projection_in(config, p), projection_out(config, p));
    if (biased(config, p))
      w[p].bias = stored_vector(checkpoint, name + ".bias", w[p].out, w.owned);
    else
      expect_none(checkpoint, name + ".bias", config, "that it has no bias");
  }
  w.norm_attn = stored_vector(checkpoint, of_layer(names.norm_attn, l), config.dim, w.owned);
  w.norm_mlp = stored_vector(checkpoint, of_layer(names.norm_mlp, l), config.dim, w.owned);
  const std::string norm_q = of_layer(names.norm_q, l), norm_k = of_layer(names.norm_k, l);
  if (config.qk_norm) {
    w.norm_q = stored_vector(checkpoint, norm_q, config.head_dim, w.owned);
    w.norm_k = stored_vector(checkpoint, norm_k, config.head_dim, w.owned);
  } else {
    expect_none(checkpoint, norm_q, config, "that q has no norm");
    expect_none(checkpoint, norm_k, config, "that k has no norm");
  }
  return w;
}

OuterWeights load_outer(const Checkpoint& checkpoint, const ModelConfig& config) {
  const TensorNames& names = *find_architecture(config.architecture, "model").names;
  OuterWeights outer;
  outer.embed = stored_rows(checkpoint, names.embed, config.dim, config.vocab);
  outer.head = config.tied ? outer.embed : stored_rows(checkpoint, names.head, config.dim, config.vocab);
  outer.norm_out = stored_vector(checkpoint, names.norm_out, config.dim, outer.owned);
  const std::string beyond = of_layer(names.norm_attn, config.layers);
  expect_none(checkpoint, beyond, config, ("num_hidden_layers is " + std::to_string(config.layers)).c_str());
  return outer;
}

}  // namespace larosa
