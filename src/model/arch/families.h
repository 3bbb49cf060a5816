// What the rows of the architecture table share: the fields that every family writes alike, and the tensor
// names that all of them took over from Llama.
#pragma once

#include "io/json.h"
#include "model/config.h"
#include "model/weights.h"

namespace larosa {

/// What transformers assumes where a family's config.json says nothing.
struct FamilyDefaults {
  int64_t kv_heads = 0;  // 0: as many as heads
  int64_t head_dim = 0;  // 0: dim / heads
  int64_t context = 0;
  std::optional<int32_t> bos = std::nullopt, eos = std::nullopt;
};

/// Sizes, norm, rotary embedding, tying and token ids. Throws Error naming file and field.
void read_common(const Fields& fields, const FamilyDefaults& defaults, ModelConfig& config);
/// What Llama and what Mistral read; others took over their forms.
void read_llama(const nlohmann::json& json, const std::string& source, ModelConfig& config);
void read_mistral(const nlohmann::json& json, const std::string& source, ModelConfig& config);
/// use_sliding_window, sliding_window, max_window_layers and layer_types of the Qwen families.
void read_qwen_window(const Fields& fields, ModelConfig& config);
/// Refuses a layer_types list that disagrees with window_of.
void check_layer_types(const Fields& fields, const ModelConfig& config);

extern const TensorNames kLlamaNames;
extern const Architecture kLlama, kSparseLlama, kMistral, kBamboo, kQwen2, kQwen3;

}  // namespace larosa
