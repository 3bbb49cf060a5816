#include "model/weights.h"

#include "base/error.h"

namespace larosa {
namespace {

std::string layer_name(const char* pattern, int64_t l) {
  std::string name = pattern;
  const size_t place = name.find("{}");
  return name.replace(place, 2, std::to_string(l));
}

Weight linear(const Checkpoint& checkpoint, const std::string& name, int64_t in, int64_t out) {
  const int64_t shape[2] = {out, in};
  const Tensor tensor = checkpoint.get(name, shape);
  if (tensor.dtype == DType::f64)
    fail(checkpoint.file_of(name), ": tensor ", name, ": dtype F64 is not supported (F32, F16, BF16)");
  return Weight{tensor.data, nullptr, tensor.dtype, Layout::rows, in, out};
}

const float* vector(const Checkpoint& checkpoint, const std::string& name, int64_t n,
                    std::vector<std::unique_ptr<float[]>>& owned) {
  return widen(checkpoint.get(name, std::span(&n, 1)), owned);
}

}  // namespace

const float* widen(const Tensor& tensor, std::vector<std::unique_ptr<float[]>>& owned) {
  const int64_t n = tensor.elements();
  owned.push_back(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(n)));
  for (int64_t i = 0; i < n; ++i)
    owned.back()[static_cast<size_t>(i)] = load_element(tensor.data, tensor.dtype, i);
  return owned.back().get();
}

LayerWeights load_layer(const Checkpoint& checkpoint, const ModelConfig& config, int64_t l) {
  const TensorNames& names = *find_architecture(config.architecture, "config").names;
  LayerWeights w;
  for (Projection p : kProjections) {
    const std::string name = layer_name(names.projection[static_cast<size_t>(p)], l);
    w[p] = linear(checkpoint, name + ".weight", projection_in(config, p), projection_out(config, p));
    const bool biased = (site_of(p) == Site::h1 && config.bias_qkv) || (p == Projection::wo && config.bias_o);
    if (biased) w[p].bias = vector(checkpoint, name + ".bias", w[p].out, w.owned);
  }
  w.norm_attn = vector(checkpoint, layer_name(names.norm_attn, l), config.dim, w.owned);
  w.norm_mlp = vector(checkpoint, layer_name(names.norm_mlp, l), config.dim, w.owned);
  if (config.qk_norm) {
    w.norm_q = vector(checkpoint, layer_name(names.norm_q, l), config.head_dim, w.owned);
    w.norm_k = vector(checkpoint, layer_name(names.norm_k, l), config.head_dim, w.owned);
  }
  return w;
}

OuterWeights load_outer(const Checkpoint& checkpoint, const ModelConfig& config) {
  const TensorNames& names = *find_architecture(config.architecture, "config").names;
  OuterWeights outer;
  outer.embed = linear(checkpoint, names.embed, config.dim, config.vocab);
  outer.head = config.tied ? outer.embed : linear(checkpoint, names.head, config.dim, config.vocab);
  outer.norm_out = vector(checkpoint, names.norm_out, config.dim, outer.owned);
  return outer;
}

}  // namespace larosa
