// Qwen2 and Qwen2.5: Llama with biases on q, k, v; a window in the upper layers where switched on.
#include "model/arch/families.h"

namespace larosa {
namespace {

void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  const Fields fields(json, source);
  read_common(fields, {.kv_heads = 32, .context = 32768}, config);
  read_qwen_window(fields, config);
  config.bias_qkv = true;
}

}  // namespace

const Architecture kQwen2 = {"qwen2", "Qwen2ForCausalLM", read, &kLlamaNames};

}  // namespace larosa
