// Qwen2 and Qwen2.5: biases on q, k and v; an optional window from layer max_window_layers on.
#include "base/error.h"
#include "model/arch/names.h"
#include "model/arch/qwen.h"
#include "model/fields.h"
#include "model/weights.h"

namespace larosa {

void read_qwen_window(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  if (!bool_field(json, source, "use_sliding_window", false)) return;
  config.window = int_field(json, source, "sliding_window", 1, int64_t{1} << 31, 4096);
  config.window_from = int_field(json, source, "max_window_layers", 0, 1 << 20, 28);
  const nlohmann::json* types = find_field(json, "layer_types");
  if (!types) return;
  if (!types->is_array() || static_cast<int64_t>(types->size()) != config.layers) {
    fail(source, ": field layer_types: expected a list of ", config.layers, " names");
  }
  for (int64_t l = 0; l < config.layers; ++l) {
    const nlohmann::json& type = (*types)[static_cast<size_t>(l)];
    const std::string expected = l >= config.window_from ? "sliding_attention" : "full_attention";
    if (!type.is_string() || type.get_ref<const std::string&>() != expected) {
      fail(source, ": field layer_types: layer ", l, " is ", type.dump(), ", expected ", expected,
           " by max_window_layers");
    }
  }
}

namespace {
void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  config.tied = bool_field(json, source, "tie_word_embeddings", false);
  config.bias_qkv = true;
  read_qwen_window(json, source, config);
}
}  // namespace

extern const Architecture kQwen2;
const Architecture kQwen2 = {"qwen2", "Qwen2ForCausalLM", read, &kHuggingFaceNames};

}  // namespace larosa
