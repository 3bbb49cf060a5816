// The tensors of a model by their place in the arithmetic, whatever file they come from.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "io/safetensors.h"
#include "model/config.h"

namespace larosa {

/// One layer. Views into the checkpoint, or into `owned` for small tensors that are widened to float32.
struct LayerWeights {
  std::array<Weight, 7> projection;  // by Projection
  const float* norm_attn = nullptr;  // (dim) gain, null: ones
  const float* norm_mlp = nullptr;   // (dim)
  const float* norm_q = nullptr;     // (head_dim) or null
  const float* norm_k = nullptr;     // (head_dim) or null
  std::vector<std::unique_ptr<float[]>> owned;

  Weight& operator[](Projection p) { return projection[static_cast<size_t>(p)]; }
  const Weight& operator[](Projection p) const { return projection[static_cast<size_t>(p)]; }
};

/// What surrounds the layers.
struct OuterWeights {
  Weight embed;                     // (vocab, dim), rows
  Weight head;                      // (vocab, dim), rows; equals embed when tied
  const float* norm_out = nullptr;  // (dim) gain, null: ones
  std::vector<std::unique_ptr<float[]>> owned;
};

/// Names of a family's tensors, "{}" stands for the layer.
struct TensorNames {
  const char* embed;
  const char* head;
  const char* norm_out;
  const char* norm_attn;
  const char* norm_mlp;
  const char* norm_q;
  const char* norm_k;
  std::array<const char*, 7> projection;  // without ".weight" / ".bias"
};

/// A row of the architecture table: how a family writes its config and names its tensors.
struct Architecture {
  const char* model_type;
  const char* class_name;  // "LlamaForCausalLM"
  void (*read_config)(const nlohmann::json& json, const std::string& source, ModelConfig& config);
  const TensorNames* names;
};

/// The row for config.json's model_type; throws Error listing the known ones.
const Architecture& find_architecture(const std::string& model_type, const std::string& source);

/// Reads a Hugging Face checkpoint's layer l: weights stay in the file (rows layout), norms and biases are
/// widened. Throws Error (file, tensor, expected, found) for absent tensors, other shapes or element types.
LayerWeights load_layer(const Checkpoint& checkpoint, const ModelConfig& config, int64_t l);
OuterWeights load_outer(const Checkpoint& checkpoint, const ModelConfig& config);
/// A vector (n) of any float type widened to float32 into `owned`.
const float* widen(const Tensor& tensor, std::vector<std::unique_ptr<float[]>>& owned);

}  // namespace larosa
