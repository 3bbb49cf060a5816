// Qwen3: RMSNorm of every q and k head, a head width of its own, no biases.
#include "model/arch/names.h"
#include "model/arch/qwen.h"
#include "model/fields.h"
#include "model/weights.h"

namespace larosa {
namespace {
void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  config.tied = bool_field(json, source, "tie_word_embeddings", false);
  config.bias_qkv = config.bias_o = bool_field(json, source, "attention_bias", false);
  config.head_dim =
      int_field(json, source, "head_dim", 2, 4096, 128);  // transformers' default, not dim / heads
  config.qk_norm = true;
  read_qwen_window(json, source, config);
}
}  // namespace

extern const Architecture kQwen3;
const Architecture kQwen3 = {"qwen3", "Qwen3ForCausalLM", read, &kHuggingFaceNames};

}  // namespace larosa
