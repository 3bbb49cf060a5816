// Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2. Also the tensor names that all families here share.
#include "model/arch/names.h"
#include "model/fields.h"
#include "model/weights.h"

namespace larosa {

const TensorNames kHuggingFaceNames = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.{}.input_layernorm.weight",
    "model.layers.{}.post_attention_layernorm.weight",
    "model.layers.{}.self_attn.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight",
    {"model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj",
     "model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.gate_proj",
     "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"}};

namespace {
void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  config.tied = bool_field(json, source, "tie_word_embeddings", false);
  config.bias_qkv = config.bias_o = bool_field(json, source, "attention_bias", false);
}
}  // namespace

extern const Architecture kLlama;
const Architecture kLlama = {"llama", "LlamaForCausalLM", read, &kHuggingFaceNames};

}  // namespace larosa
