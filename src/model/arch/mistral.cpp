// Mistral 7B: Llama with grouped heads and, in its first version, a sliding window in every layer.
#include "model/arch/families.h"

namespace larosa {

void read_mistral(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  const Fields fields(json, source);
  read_common(fields, {.kv_heads = 8, .context = 4096 * 32, .bos = 1, .eos = 2}, config);
  if (fields.boolean_or("attention_bias", false)) fields.refuse("attention_bias", "mistral has no biases");
  // null means no window; a config that does not name the field means the first version's 4096.
  constexpr int64_t kFirstVersion = 4096;
  config.window = json.contains("sliding_window")
                      ? fields.find_integer("sliding_window", 1, int64_t{1} << 31).value_or(0)
                      : kFirstVersion;
  check_layer_types(fields, config);
}

const Architecture kMistral = {"mistral", "MistralForCausalLM", read_mistral, &kLlamaNames};

}  // namespace larosa
