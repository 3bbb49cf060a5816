// Mistral: Llama with a sliding window over all layers.
#include "model/arch/names.h"
#include "model/fields.h"
#include "model/weights.h"

namespace larosa {
namespace {
void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  config.tied = bool_field(json, source, "tie_word_embeddings", false);
  // transformers' default is 4096 where the field is absent; null means none.
  const bool none = json.contains("sliding_window") && json["sliding_window"].is_null();
  config.window = none ? 0 : int_field(json, source, "sliding_window", 1, int64_t{1} << 31, 4096);
}
}  // namespace

extern const Architecture kMistral;
const Architecture kMistral = {"mistral", "MistralForCausalLM", read, &kHuggingFaceNames};

}  // namespace larosa
