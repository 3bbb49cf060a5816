// What a model is, as numbers: read from config.json by a row of the architecture table.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/types.h"
#include "plan/projection.h"

namespace larosa {

/// rope_type "llama3" of Llama 3.1 and later: long wavelengths are slowed down by `factor`.
struct Llama3Rope {
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  int64_t original_context = 8192;
};

struct ModelConfig {
  std::string architecture;  // the table row's model_type: "llama", "mistral", "qwen2", "qwen3"
  int64_t dim = 0;           // stream width
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t ffn = 0;
  int64_t vocab = 0;
  int64_t context = 0;  // longest timeline the model was made for, tokens
  float norm_eps = 1e-5f;
  Activation activation;        // of the feed-forward
  double sparse_ratio = 0;      // Q-Sparse: trained with this share of every projection's inputs set to zero
  bool sparse_rescale = false;  // … and with what is left of them divided by its length
  double rope_theta = 10000;
  std::optional<Llama3Rope> rope_scaling;
  bool tied = false;         // lm_head is the embedding
  bool bias_qkv = false;     // q, k, v have biases (Qwen2)
  bool bias_o = false;       // o has one as well (Llama with attention_bias)
  bool qk_norm = false;      // RMSNorm of each q and k head (Qwen3)
  int64_t window = 0;        // sliding attention window in tokens, 0: none
  int64_t window_from = 0;   // first layer that uses the window (Qwen2: max_window_layers)
  std::vector<int32_t> bos;  // token ids that start a text (usually one)
  std::vector<int32_t> eos;  // token ids that end one

  int64_t q_dim() const { return heads * head_dim; }
  int64_t kv_dim() const { return kv_heads * head_dim; }
  /// Entries of n that a Q-Sparse model keeps.
  int64_t trained_keep(int64_t n) const {
    return static_cast<int64_t>((1 - sparse_ratio) * static_cast<double>(n));
  }
  /// Window of layer l, 0: none.
  int64_t window_of(int64_t l) const { return l >= window_from ? window : 0; }
  /// Rotary frequencies, (head_dim / 2): theta^(−2i/E), with rope_scaling applied as transformers does.
  std::vector<float> inv_freq() const;
};

/// Reads `dir`/config.json (and the eos ids of generation_config.json where present). Throws Error naming the
/// file and the field for an unknown model_type, an impossible number, and for everything that would change
/// the arithmetic and is not implemented (rope_scaling types, quantization_config, activations, mlp_bias …).
ModelConfig load_config(const std::string& dir);
/// The same from a parsed config.json; `source` is its name in messages. No generation_config.
ModelConfig parse_config(const nlohmann::json& json, const std::string& source);

/// (in, out) of a projection.
int64_t projection_in(const ModelConfig& c, Projection p);
int64_t projection_out(const ModelConfig& c, Projection p);
/// Weights of the seven projections of one layer.
int64_t layer_weights(const ModelConfig& c);

}  // namespace larosa
