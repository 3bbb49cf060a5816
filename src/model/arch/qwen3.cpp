// Qwen3: no biases, RMSNorm of every q and k head, a head width of its own.
#include "model/arch/families.h"

namespace larosa {
namespace {

void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  const Fields fields(json, source);
  read_common(fields, {.kv_heads = 32, .head_dim = 128, .context = 32768}, config);
  read_qwen_window(fields, config);
  config.bias_qkv = config.bias_o = fields.boolean_or("attention_bias", false);
  config.qk_norm = true;
}

}  // namespace

const Architecture kQwen3 = {"qwen3", "Qwen3ForCausalLM", read, &kLlamaNames};

}  // namespace larosa
