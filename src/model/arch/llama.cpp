// Llama 2, 3, 3.1, 3.2, and those that took its form: TinyLlama, SmolLM2.
#include "model/arch/families.h"

namespace larosa {

void read_llama(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  const Fields fields(json, source);
  read_common(fields, {.context = 2048, .bos = 1, .eos = 2}, config);
  check_layer_types(fields, config);
  config.bias_qkv = config.bias_o = fields.boolean_or("attention_bias", false);
}

const TensorNames kLlamaNames = {
    .embed = "model.embed_tokens.weight",
    .head = "lm_head.weight",
    .norm_out = "model.norm.weight",
    .norm_attn = "model.layers.{}.input_layernorm.weight",
    .norm_mlp = "model.layers.{}.post_attention_layernorm.weight",
    .norm_q = "model.layers.{}.self_attn.q_norm.weight",
    .norm_k = "model.layers.{}.self_attn.k_norm.weight",
    .projection = {"model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj",
                   "model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.o_proj",
                   "model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj",
                   "model.layers.{}.mlp.down_proj"},
};
const Architecture kLlama = {"llama", "LlamaForCausalLM", read_llama, &kLlamaNames};

}  // namespace larosa
