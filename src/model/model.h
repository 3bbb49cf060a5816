// A model ready to run: numbers, weights, plan. Loaded from a Hugging Face directory (dense) or from a
// directory that `larosa sparsify` wrote, or filled with random weights to time a shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/huge_pages.h"
#include "base/types.h"
#include "io/safetensors.h"
#include "model/config.h"
#include "model/weights.h"
#include "plan/plan.h"

namespace larosa {

/// The product that a projection's dropped entries go through. Quantised, both have a line for each of few
/// ranks: by channels a line of `in` would be mostly padding (rank 51 of 4096 as int8: 192 bytes for 51).
struct LowRank {
  Weight in;   // (D, rank) channels; quantised: rows
  Weight out;  // (rank, N) channels
};

/// What a group's rule needs besides numbers; null or empty where the rule does not ask for it.
struct GroupData {
  const float* scale = nullptr;  // (D) score weights
  Weight basis;                  // (D, D) channels: h B
  std::vector<LowRank> low;      // beside the group's projections
};

/// Channels of the stream that a quantised adapter keeps in float32. Leading principal components are so
/// large (0.99 of the first one's row is its own entry) that the rounding of the row's other entries drowns
/// theirs: with it mix-88m at 50 % loses 5 % of perplexity, without it nothing.
constexpr int64_t kAdapterTop = 16;

/// A change of the stream's basis: x A, of the skip path alone; the projection that adds to it writes in the
/// new basis. Empty: none.
struct Adapter {
  Weight weight;  // (dim, dim) channels
  Weight top;     // beside a quantised one, its first kAdapterTop channels (zero in it)

  explicit operator bool() const { return static_cast<bool>(weight); }
  int64_t bytes() const { return weight ? weight.bytes() + top.bytes() : 0; }
};

/// One layer: its weights and how they are read.
struct Layer {
  LayerWeights weights;
  LayerPlan plan = dense_layer();
  std::vector<GroupData> groups;  // beside plan.groups
  Adapter middle;                 // beside o: basis of the attention → basis of the MLP; or empty
  Adapter adapter;                // beside down: basis of this layer → basis of the next; or empty
};

struct Model {
  ModelConfig config;
  Plan plan;  // the layers' plans and where they come from; dense: method "dense"
  std::vector<Layer> layers;
  OuterWeights outer;
  std::optional<Checkpoint> checkpoint;             // keeps the mapped files; none for random weights
  std::vector<HugePages> memory;                    // random weights
  std::vector<std::shared_ptr<const void>> placed;  // what `place` uploaded
};

class Backend;
/// Uploads every tensor that the model runs on to the backend's memory, each once, and points the model
/// there. Nothing moves where the backend works in host memory. The backend must outlive the model.
void place(Model& model, Backend& backend);
/// The same of one layer: what was uploaded lives as long as what is returned.
[[nodiscard]] std::vector<std::shared_ptr<const void>> place(Layer& layer, const ModelConfig& config,
                                                             Backend& backend);

/// How a layer of this shape is read as it was trained: whole but for what is exactly zero (the neurons of
/// ReLU and its kin at rest, and what `down` would multiply with them), or by its own Top-K (Q-Sparse). The
/// result is the dense one bit for bit.
LayerPlan trained_layer(const ModelConfig& config);

/// Loads `dir`. Throws Error for everything that load_config, Checkpoint, load_layer and validate refuse.
Model load_model(const std::string& dir);

/// How sparsify stores a projection: by channels, but `up` by outputs where a plan chooses neurons.
Layout stored_layout(const LayerPlan& plan, Projection p);
/// How it stores LowRank::in.
constexpr Layout low_in_layout(bool quantised) {
  return quantised ? Layout::rows : Layout::channels;
}

/// Layer l of a file that sparsify wrote, and what surrounds the layers. The checkpoint must outlive them.
Layer load_stored_layer(const Checkpoint& checkpoint, const ModelConfig& config, const LayerPlan& plan,
                        int64_t l);
OuterWeights load_stored_outer(const Checkpoint& checkpoint, const ModelConfig& config);

/// True when `dir`/config.json has a `larosa` section, that is, when sparsify wrote it.
bool is_larosa_dir(const std::string& dir);

/// The quantised weight whose bytes a file's tensor (U8) is; null: none.
const Weight* find_quantised(const Model& model, const Tensor& tensor);
/// Throws Error (file, tensor) for the first NaN or infinity among the stored tensors and among the scales of
/// quantised ones (`--check-tensors`).
void check_finite(const Model& model);

/// Numbers that a plan is checked against.
PlanShape plan_shape(const ModelConfig& config);

/// Bytes that decoding one token reads, by what they are for.
struct TokenBytes {
  int64_t projections = 0;        // kept channels of the seven projections, all layers; thresholds: expected
  int64_t projections_dense = 0;  // the same with every channel kept
  int64_t adapters = 0;
  int64_t low_rank = 0;         // products of dropped entries
  int64_t thinning = 0;         // score weights and run-time bases
  int64_t outer = 0;            // head, norms, biases, one embedding row
  int64_t kv_per_position = 0;  // keys and values of one earlier token, all layers
  int64_t kv_windowed = 0;      // of it in layers with a sliding window
  int64_t window = 0;           // its length, tokens; 0: none

  int64_t sparse(int64_t positions = 0) const {
    return projections + low_rank + adapters + thinning + outer + kv(positions);
  }
  /// Share of the projections' bytes that is not read.
  double sparsity() const {
    return 1 - static_cast<double>(projections + low_rank) / static_cast<double>(projections_dense);
  }
  /// The model as it came: every channel, no adapter, no score weights.
  int64_t dense(int64_t positions = 0) const { return projections_dense + outer + kv(positions); }
  /// Keys and values read by a token with `positions` earlier ones.
  int64_t kv(int64_t positions) const {
    const int64_t seen = window > 0 ? std::min(positions, window) : positions;
    return positions * (kv_per_position - kv_windowed) + seen * kv_windowed;
  }
};
/// `kv`: element type of the cache.
TokenBytes token_bytes(const Model& model, DType kv = DType::f32);

/// Bytes of all tensors that running the model may touch.
int64_t model_bytes(const Model& model);
/// Number of parameters of the model's shape (tied head counted once).
int64_t parameter_count(const ModelConfig& config);

}  // namespace larosa
