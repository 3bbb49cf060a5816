#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numbers>

#include "base/error.h"
#include "io/json.h"
#include "model/arch/families.h"

namespace larosa {

using nlohmann::json;

namespace {

// Far above every known model, and low enough that products of two stay far from 2^63.
constexpr int64_t kMaxLayers = 1024, kMaxHeads = 4096, kMaxHeadDim = 4096, kMaxDim = int64_t{1} << 20,
                  kMaxFfn = int64_t{1} << 22, kMaxVocab = int64_t{1} << 24, kMaxContext = int64_t{1} << 31;
constexpr int64_t kMaxFile = int64_t{1} << 22;  // bytes of a config.json

/// Fields that would change the arithmetic, with the value at which they do not. Anything else is refused.
struct Neutral {
  const char* field;
  json value;
};
const std::vector<Neutral>& neutral_fields() {
  static const std::vector<Neutral> fields = {
      {"quantization_config", nullptr},
      {"compression_config", nullptr},
      {"partial_rotary_factor", 1.0},
      {"mlp_bias", false},
      {"rope_interleaved", false},
      {"use_qk_norm", false},
      {"qk_layernorm", false},
      {"num_experts", nullptr},
      {"num_local_experts", nullptr},
      {"n_routed_experts", nullptr},
      {"clip_qkv", nullptr},
      {"attn_logit_softcapping", nullptr},
      {"final_logit_softcapping", nullptr},
      {"query_pre_attn_scalar", nullptr},
      {"logit_scale", 1.0},
      {"logits_scaling", 1.0},
      {"embedding_multiplier", 1.0},
      {"residual_multiplier", 1.0},
      {"attention_multiplier", nullptr},
      {"attention_chunk_size", nullptr},
      {"no_rope_layers", nullptr},
      {"kv_lora_rank", nullptr},
      {"is_encoder_decoder", false},
      {"add_cross_attention", false},
  };
  return fields;
}

void refuse_unknown_arithmetic(const Fields& fields) {
  for (const Neutral& neutral : neutral_fields()) {
    const json* value = fields.find(neutral.field);
    if (value && *value != neutral.value) fields.refuse(neutral.field, "which is not implemented");
  }
}

void check_class(const Fields& fields, const Architecture& architecture) {
  const json* classes = fields.find("architectures");
  if (!classes) return;
  const bool known = classes->is_array() && classes->size() == 1 &&
                     ((*classes)[0] == architecture.class_name || (*classes)[0] == "LarosaForCausalLM");
  if (!known) {
    fields.refuse("architectures", std::string("model_type ") + architecture.model_type + " is run as [\"" +
                                       architecture.class_name + "\"]");
  }
}

Llama3Rope read_llama3_rope(const Fields& fields) {
  Llama3Rope rope;
  rope.factor = fields.number("factor", 1, 1e6);
  rope.low_freq_factor = fields.number("low_freq_factor", 1e-6, 1e6);
  rope.high_freq_factor = fields.number("high_freq_factor", 1e-6, 1e6);
  rope.original_context = fields.integer("original_max_position_embeddings", 1, kMaxContext);
  if (rope.high_freq_factor <= rope.low_freq_factor)
    fields.refuse("high_freq_factor", "expected more than low_freq_factor");
  return rope;
}

/// rope_theta and rope_scaling, or the one dictionary rope_parameters that later files hold both in.
void read_rope(const Fields& fields, ModelConfig& config) {
  constexpr double kLeast = 1e-3, kMost = 1e15;
  config.rope_theta = fields.find_number("rope_theta", kLeast, kMost).value_or(10000);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const auto rope = fields.find_object(name);
    if (!rope) continue;
    config.rope_theta = rope->find_number("rope_theta", kLeast, kMost).value_or(config.rope_theta);
    if (rope->find_number("partial_rotary_factor", -1e9, 1e9).value_or(1) != 1)
      rope->refuse("partial_rotary_factor", "which is not implemented");
    const char* key = rope->find("rope_type") ? "rope_type" : "type";
    const std::string type = rope->find_text(key).value_or("default");
    if (type == "llama3") {
      config.rope_scaling = read_llama3_rope(*rope);
    } else if (type != "default") {
      rope->refuse(key, "only \"default\" and \"llama3\" are implemented");
    } else if (rope->find("factor")) {
      rope->refuse("factor", "which needs a rope_type");
    }
  }
}

/// hidden_act as transformers names it, and fatrelu with hidden_act_param, its threshold (ProSparse).
Activation read_activation(const Fields& fields) {
  constexpr std::pair<const char*, Activation::Kind> kNames[] = {{"silu", Activation::silu},
                                                                 {"relu", Activation::relu},
                                                                 {"fatrelu", Activation::relu},
                                                                 {"relu2", Activation::relu2}};
  const std::string name = fields.find_text("hidden_act").value_or("silu");
  for (const auto& [known, kind] : kNames) {
    if (name != known) continue;
    const double threshold = name == "fatrelu" ? fields.number("hidden_act_param", 0, 1e6) : 0;
    return {kind, static_cast<float>(threshold)};
  }
  fields.refuse("hidden_act", "implemented are silu, relu, relu2 and fatrelu");
}

/// Q-Sparse (arXiv 2407.10969): `sparse_ratio`, the name and the rounding of its authors' code
/// (github.com/ustcwhy/Q-Sparse); not positive: dense.
double read_sparse_ratio(const Fields& fields, const ModelConfig& config) {
  constexpr double kMost = 0.99;
  const double ratio = fields.find_number("sparse_ratio", -1e9, kMost).value_or(0);
  if (ratio <= 0) return 0;
  ModelConfig thinned = config;
  thinned.sparse_ratio = ratio;
  if (std::min({thinned.trained_keep(config.dim), thinned.trained_keep(config.q_dim()),
                thinned.trained_keep(config.ffn)}) < 1)
    fields.refuse("sparse_ratio", "which keeps nothing");
  return ratio;
}

/// The rescale of the paper (§2.1), which its authors' code does not have: a field of our own.
bool read_sparse_rescale(const Fields& fields, const ModelConfig& config) {
  const bool rescale = fields.boolean_or("sparse_rescale", false);
  if (rescale && config.sparse_ratio == 0) fields.refuse("sparse_rescale", "which needs a sparse_ratio");
  return rescale;
}

/// One id, a list of ids, or none.
std::vector<int32_t> read_ids(const Fields& fields, const char* name, std::optional<int32_t> absent,
                              int64_t vocab) {
  std::vector<int32_t> ids;
  if (!fields.object().contains(name)) {
    if (absent && *absent < vocab) ids.push_back(*absent);
    return ids;
  }
  const json* value = fields.find(name);
  if (!value) return ids;
  const auto read = [&](const json& id) {
    const auto number = integer_in(id, 0, vocab - 1);
    if (!number)
      fields.refuse(name, "expected token ids from 0 to " + std::to_string(vocab - 1) + " (vocab_size)");
    ids.push_back(static_cast<int32_t>(*number));
  };
  if (value->is_array()) {
    for (const json& id : *value) read(id);
  } else {
    read(*value);
  }
  return ids;
}

void add_ids(std::vector<int32_t>& ids, const std::vector<int32_t>& more) {
  for (const int32_t id : more) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

}  // namespace

void read_common(const Fields& fields, const FamilyDefaults& defaults, ModelConfig& config) {
  config.dim = fields.integer("hidden_size", 1, kMaxDim);
  config.layers = fields.integer("num_hidden_layers", 1, kMaxLayers);
  config.heads = fields.integer("num_attention_heads", 1, kMaxHeads);
  config.ffn = fields.integer("intermediate_size", 1, kMaxFfn);
  config.vocab = fields.integer("vocab_size", 1, kMaxVocab);

  const bool says_kv_heads = fields.object().contains("num_key_value_heads");  // null: as many as heads
  const int64_t kv_heads = says_kv_heads || defaults.kv_heads == 0 ? config.heads : defaults.kv_heads;
  config.kv_heads = fields.find_integer("num_key_value_heads", 1, kMaxHeads).value_or(kv_heads);
  if (config.heads % config.kv_heads != 0) {
    fields.refuse("num_attention_heads",
                  "expected a multiple of num_key_value_heads, " + std::to_string(config.kv_heads));
  }
  const bool says_head_dim = fields.object().contains("head_dim");
  const auto head_dim = fields.find_integer("head_dim", 1, kMaxHeadDim);
  if (head_dim) {
    config.head_dim = *head_dim;
  } else if (!says_head_dim && defaults.head_dim != 0) {
    config.head_dim = defaults.head_dim;
  } else {
    if (config.dim % config.heads != 0) {
      fields.refuse("hidden_size",
                    "expected a multiple of num_attention_heads, " + std::to_string(config.heads));
    }
    config.head_dim = config.dim / config.heads;
  }
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim)
    fail(fields.source(), ": head_dim is ", config.head_dim, ", expected an even number up to ", kMaxHeadDim);
  if (config.q_dim() > kMaxDim)
    fail(fields.source(), ": num_attention_heads times head_dim exceeds ", kMaxDim);

  config.context = fields.find_integer("max_position_embeddings", 1, kMaxContext).value_or(defaults.context);
  config.norm_eps = static_cast<float>(fields.find_number("rms_norm_eps", 1e-30, 0.0999).value_or(1e-6));
  config.activation = read_activation(fields);
  config.sparse_ratio = read_sparse_ratio(fields, config);
  config.sparse_rescale = read_sparse_rescale(fields, config);
  read_rope(fields, config);
  config.tied = fields.boolean_or("tie_word_embeddings", false);
  config.bos = read_ids(fields, "bos_token_id", defaults.bos, config.vocab);
  config.eos = read_ids(fields, "eos_token_id", defaults.eos, config.vocab);
}

void check_layer_types(const Fields& fields, const ModelConfig& config) {
  const json* types = fields.find("layer_types");
  if (!types) return;
  if (!types->is_array() || types->size() != static_cast<size_t>(config.layers))
    fields.refuse("layer_types", "expected a list of num_hidden_layers, " + std::to_string(config.layers));
  for (int64_t l = 0; l < config.layers; ++l) {
    const char* expected = config.window_of(l) > 0 ? "sliding_attention" : "full_attention";
    const json& type = (*types)[static_cast<size_t>(l)];
    if (type != expected) {
      fail(fields.source(), ": layer_types of layer ", l, " is ", shown(type),
           ", but the window fields say \"", expected, "\"");
    }
  }
}

void read_qwen_window(const Fields& fields, ModelConfig& config) {
  constexpr int64_t kWindow = 4096, kFirstLayer = 28;  // where the file says nothing
  if (fields.boolean_or("use_sliding_window", false)) {
    const auto window = fields.find_integer("sliding_window", 1, kMaxContext);
    config.window = window.value_or(fields.object().contains("sliding_window") ? 0 : kWindow);
    config.window_from = fields.find_integer("max_window_layers", 0, kMaxContext).value_or(kFirstLayer);
  }
  check_layer_types(fields, config);
}

ModelConfig parse_config(const json& root, const std::string& source) {
  const Fields fields(root, source);
  const Architecture& architecture = find_architecture(fields.text("model_type"), source);
  check_class(fields, architecture);
  refuse_unknown_arithmetic(fields);
  ModelConfig config;
  config.architecture = architecture.model_type;
  architecture.read_config(root, source, config);
  return config;
}

ModelConfig load_config(const std::string& dir) {
  const std::filesystem::path base(dir);
  const std::string path = (base / "config.json").string();
  ModelConfig config = parse_config(read_json(path, kMaxFile), path);
  const std::string generation = (base / "generation_config.json").string();
  std::error_code ignored;
  if (std::filesystem::exists(generation, ignored)) {
    const json root = read_json(generation, kMaxFile);
    add_ids(config.eos, read_ids(Fields(root, generation), "eos_token_id", std::nullopt, config.vocab));
  }
  return config;
}

std::vector<float> ModelConfig::inv_freq() const {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double f = std::pow(rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (rope_scaling) {
      // Turns over the original context: few are slowed by factor, many stay, those between are blended.
      const Llama3Rope& rope = *rope_scaling;
      const double turns = static_cast<double>(rope.original_context) * f / (2 * std::numbers::pi);
      const double blend = std::clamp(
          (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0);
      f = (1 - blend) * f / rope.factor + blend * f;
    }
    frequencies.push_back(static_cast<float>(f));
  }
  return frequencies;
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
    case Projection::gate:
    case Projection::up:
      return c.ffn;
    case Projection::wo:
    case Projection::down:
      return c.dim;
  }
  return 0;
}

int64_t layer_weights(const ModelConfig& c) {
  int64_t sum = 0;
  for (const Projection p : kProjections) sum += projection_in(c, p) * projection_out(c, p);
  return sum;
}

}  // namespace larosa
