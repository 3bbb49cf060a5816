// TurboSparse-Mistral (arXiv 2406.05955): Mistral whose feed-forward is ReLU(gate) · ReLU(up). Its config
// says hidden_act "relu"; the predictors in its checkpoints are not needed: what is skipped is exactly zero.
#include "model/arch/families.h"

namespace larosa {
namespace {

void read(const nlohmann::json& json, const std::string& source, ModelConfig& config) {
  read_mistral(json, source, config);
  if (config.activation != Activation{Activation::relu, 0})
    Fields(json, source).refuse("hidden_act", "bamboo's is \"relu\"");
  config.activation.kind = Activation::drelu;
}

}  // namespace

const Architecture kBamboo = {"bamboo", "BambooForCausalLM", read, &kLlamaNames};

}  // namespace larosa
