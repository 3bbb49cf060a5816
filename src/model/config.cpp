#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numbers>

#include "base/error.h"
#include "io/json.h"
#include "model/fields.h"
#include "model/weights.h"

namespace larosa {
namespace {

using nlohmann::json;

constexpr int64_t kWidest = 1 << 20;  // no model is near it; keeps every product of two widths in range

/// rope_scaling (rope_parameters in newer files): absent, "default" or "llama3".
void read_rope(const json& j, const std::string& source, ModelConfig& c) {
  const json* parameters = find_field(j, "rope_parameters");
  const json* scaling = parameters ? parameters : find_field(j, "rope_scaling");
  const std::string name = parameters ? "rope_parameters" : "rope_scaling";
  const bool own_theta = parameters && parameters->is_object() && find_field(*parameters, "rope_theta");
  c.rope_theta = number_field(own_theta ? *parameters : j, source, "rope_theta", 0, 1e12, 10000.0);
  if (!scaling) return;
  if (!scaling->is_object()) fail(source, ": field ", name, " is ", scaling->dump(), ", expected an object");
  const std::string where = source + ": field " + name;
  const std::string type =
      text_field(*scaling, where, "rope_type", text_field(*scaling, where, "type", "default"));
  if (type == "default") return;
  if (type != "llama3")
    fail(source, ": field ", name, ": type \"", type, "\" is not supported (default, llama3)");
  Llama3Rope rope;
  rope.factor = number_field(*scaling, where, "factor", 0, 1e6);
  rope.low_freq_factor = number_field(*scaling, where, "low_freq_factor", 0, 1e6);
  rope.high_freq_factor = number_field(*scaling, where, "high_freq_factor", 0, 1e6);
  rope.original_context = int_field(*scaling, where, "original_max_position_embeddings", 1, int64_t{1} << 31);
  if (rope.high_freq_factor <= rope.low_freq_factor)
    fail(where, ": high_freq_factor is not above low_freq_factor");
  c.rope_scaling = rope;
}

/// A token id or a list of them.
std::vector<int32_t> read_ids(const json& j, const std::string& source, const char* name, int64_t vocab) {
  const json* field = find_field(j, name);
  if (!field) return {};
  std::vector<int32_t> ids;
  for (const json& id : field->is_array() ? *field : json::array({*field})) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab) {
      fail(source, ": field ", name, " is ", field->dump(), ", expected token ids below ", vocab);
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

/// What would change the arithmetic and is not implemented.
void refuse_unsupported(const json& j, const std::string& source) {
  if (find_field(j, "quantization_config"))
    fail(source, ": field quantization_config: quantised checkpoints are not supported");
  const std::string act = text_field(j, source, "hidden_act", "silu");
  if (act != "silu" && act != "swish")
    fail(source, ": field hidden_act \"", act, "\" is not supported (silu)");
  refuse_true(j, source, "mlp_bias", "biases in the MLP are not supported");
  refuse_true(j, source, "rope_interleaved", "interleaved rotary embedding is not supported");
  refuse_true(j, source, "is_encoder_decoder", "encoder-decoder models are not supported");
  refuse_true(j, source, "add_cross_attention", "cross attention is not supported");
  if (number_field(j, source, "partial_rotary_factor", 0, 1, 1.0) != 1.0)
    fail(source, ": field partial_rotary_factor: only 1 is supported");
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    if (find_field(j, name)) fail(source, ": field ", name, ": mixtures of experts are not supported");
  }
  for (const char* name : {"attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
                           "embedding_multiplier", "residual_multiplier"}) {
    if (find_field(j, name)) fail(source, ": field ", name, ": is not supported");
  }
}

}  // namespace

ModelConfig parse_config(const json& j, const std::string& source) {
  const std::string type = text_field(j, source, "model_type", "");
  if (type.empty()) fail(source, ": field model_type is missing");
  const Architecture& architecture = find_architecture(type, source);
  refuse_unsupported(j, source);
  ModelConfig c;
  c.architecture = type;
  c.dim = int_field(j, source, "hidden_size", 1, kWidest);
  c.layers = int_field(j, source, "num_hidden_layers", 1, 1024);
  c.heads = int_field(j, source, "num_attention_heads", 1, 4096);
  c.kv_heads = int_field(j, source, "num_key_value_heads", 1, 4096, c.heads);
  c.ffn = int_field(j, source, "intermediate_size", 1, kWidest);
  c.vocab = int_field(j, source, "vocab_size", 1, 1 << 24);
  c.context = int_field(j, source, "max_position_embeddings", 1, int64_t{1} << 31);
  if (c.heads % c.kv_heads != 0)
    fail(source, ": field num_key_value_heads is ", c.kv_heads,
         ", which does not divide num_attention_heads ", c.heads);
  if (!find_field(j, "head_dim") && c.dim % c.heads != 0) {
    fail(source, ": field num_attention_heads is ", c.heads, ", which does not divide hidden_size ", c.dim);
  }
  c.head_dim = int_field(j, source, "head_dim", 2, 4096, c.dim / c.heads);
  if (c.head_dim < 2 || c.head_dim % 2 != 0)
    fail(source, ": field head_dim is ", c.head_dim, ", expected an even number");
  if (c.q_dim() > kWidest)
    fail(source, ": field num_attention_heads is ", c.heads, ": too wide with head_dim ", c.head_dim);
  c.norm_eps = static_cast<float>(number_field(j, source, "rms_norm_eps", 0, 0.1, 1e-6));
  read_rope(j, source, c);
  c.bos = read_ids(j, source, "bos_token_id", c.vocab);
  c.eos = read_ids(j, source, "eos_token_id", c.vocab);
  architecture.read_config(j, source, c);
  return c;
}

ModelConfig load_config(const std::string& dir) {
  namespace fs = std::filesystem;
  const std::string path = (fs::path(dir) / "config.json").string();
  if (!fs::is_directory(dir)) fail(dir, ": is not a directory");
  ModelConfig c = parse_config(read_json(path), path);
  const fs::path generation = fs::path(dir) / "generation_config.json";
  if (fs::exists(generation)) {
    const json j = read_json(generation.string());
    for (int32_t id : read_ids(j, generation.string(), "eos_token_id", c.vocab)) {
      if (std::find(c.eos.begin(), c.eos.end(), id) == c.eos.end()) c.eos.push_back(id);
    }
  }
  return c;
}

std::vector<float> ModelConfig::inv_freq() const {
  std::vector<float> freq(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < freq.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    freq[i] = 1.0f / static_cast<float>(std::pow(rope_theta, static_cast<double>(exponent)));
    if (!rope_scaling) continue;
    // Llama 3.1: wavelengths beyond the original context are stretched by factor, short ones stay, with a
    // smooth passage between (transformers' modeling_rope_utils, rope_type llama3).
    const Llama3Rope& r = *rope_scaling;
    const double wavelength = 2 * std::numbers::pi / static_cast<double>(freq[i]);
    const double original = static_cast<double>(r.original_context);
    if (wavelength < original / r.high_freq_factor) continue;
    const double slow = static_cast<double>(freq[i]) / r.factor;
    if (wavelength > original / r.low_freq_factor) {
      freq[i] = static_cast<float>(slow);
    } else {
      const double smooth =
          (original / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
      freq[i] = static_cast<float>((1 - smooth) * slow + smooth * static_cast<double>(freq[i]));
    }
  }
  return freq;
}

int64_t projection_in(const ModelConfig& c, Projection p) {
  switch (site_of(p)) {
    case Site::h1:
    case Site::h3:
      return c.dim;
    case Site::h2:
      return c.q_dim();
    case Site::h4:
      return c.ffn;
  }
  return 0;
}

int64_t projection_out(const ModelConfig& c, Projection p) {
  switch (p) {
    case Projection::wq:
      return c.q_dim();
    case Projection::wk:
    case Projection::wv:
      return c.kv_dim();
    case Projection::wo:
    case Projection::down:
      return c.dim;
    case Projection::gate:
    case Projection::up:
      return c.ffn;
  }
  return 0;
}

int64_t layer_weights(const ModelConfig& c) {
  int64_t total = 0;
  for (Projection p : kProjections) total += projection_in(c, p) * projection_out(c, p);
  return total;
}

}  // namespace larosa
