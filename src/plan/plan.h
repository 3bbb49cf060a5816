// What is thinned, as data. A sparsity method writes a Plan; the engine has one short interpreter of it
// (model/decoder.cpp, `apply`). No code asks for a method's name.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "plan/projection.h"

namespace larosa {

/// Of what sparsify writes, finished or not. 2: adapters turn the skip path alone. 3: a quantised head by
/// outputs, config.json's tie_word_embeddings as stored.
inline constexpr int kPlanVersion = 3;

enum class Select { all, topk, threshold };

/// How one activation vector is thinned before a group of projections reads it.
struct Rule {
  Select select = Select::all;
  int64_t keep =
      0;          // topk: entries kept per token; threshold: on average when the cut was chosen, 0: unknown
  float cut = 0;  // threshold: entries with score above it are kept
  bool scaled = false;  // the score is |x_i|·scale_i, else |x_i|; tensor "layers.L.<first projection>.scale"
  bool rotated = false;  // thinned in a run-time basis: h ← select(h B) Bᵀ; tensor "layers.L.<first>.basis"
  bool trained = false;  // the model was trained to be read so: a dense pass thins it too
  // What is kept is divided by its own length: x ← x / ‖x‖₂ (Q-Sparse, arXiv 2407.10969 §2.1).
  bool rescaled = false;
  bool operator==(const Rule&) const = default;
};

/// Projections that share a rule (and so a selection). All read the same site.
struct Group {
  std::vector<Projection> projections;
  Rule rule;
  // Of the product that dropped entries go through, y = W x_kept + (x_dropped A) B: R-Sparse, arXiv
  // 2504.19449 §3.2; 0: they count as zero. Tensors "layers.L.<projection>.low_in" (D, rank; quantised: rank,
  // D), ".low_out" (rank, N).
  int64_t rank = 0;
  bool operator==(const Group&) const = default;
};

struct LayerPlan {
  std::vector<Group> groups;  // every projection exactly once, in the order of the arithmetic
  // The stream changes basis where down is added to it, and where o is. The tensors "layers.L.adapter" and
  // "layers.L.middle" turn what is added to; down and o write in the new basis.
  bool adapter = false, middle = false;
  // Which of the F neurons of the feed-forward are computed, by |a(gate)|: `up` is not read for the others,
  // and a(gate)·up is zero there (CATS, arXiv 2404.08763 §3; cut 0: the zeros of ReLU). What `down` then
  // skips is its own group's rule. The layer's `up` stands in rows, one output after the other.
  Rule neurons;
  bool operator==(const LayerPlan&) const = default;
};

struct Plan {
  std::string method;                        // which method wrote it: for people, never asked by code
  std::string form;                          // "folded" or "simulate"
  std::string fingerprint;                   // Checkpoint::fingerprint of the source model
  double sparsity = 0;                       // asked for, as share of the weight bytes of the projections
  std::map<std::string, std::string> notes;  // options and calibration data, for people
  std::vector<LayerPlan> layers;
  bool operator==(const Plan&) const = default;
};

/// A layer whose seven projections are read whole, in the usual four groups (q k v, o, gate up, down).
LayerPlan dense_layer();
/// True when some group's share depends on the text.
bool varies(const Plan& plan);
/// Share of `dim` entries that a rule lets through, for thresholds the expected one (all where unknown).
double kept_share(const Rule& rule, int64_t dim);

/// JSON text ↔ Plan. plan_from_json throws Error naming `source` and the field.
std::string plan_to_json(const Plan& plan);
Plan plan_from_json(const std::string& text, const std::string& source);

/// Numbers of a model that a plan is checked against: entries of each site and weights of each projection.
struct PlanShape {
  int64_t layers = 0;
  std::array<int64_t, 4> site_dim{};            // by Site
  std::array<int64_t, 7> projection_weights{};  // by Projection
};

/// Throws Error (source, layer, field) unless every projection stands in exactly one group whose projections
/// share a site, keeps are in [1, D], cuts are finite and non-negative, ranks are in [0, min(D, N)] and only
/// where something is dropped, rescaled rules select something, are not rotated and have no rank, `up`
/// reads its whole input where neurons are chosen, and the number of layers fits.
void validate(const Plan& plan, const PlanShape& shape, const std::string& source);

/// Outputs of a projection.
inline int64_t outputs(const PlanShape& shape, Projection p) {
  return shape.projection_weights[static_cast<size_t>(p)] / shape.site_dim[static_cast<size_t>(site_of(p))];
}

/// Weights of a layer's low-rank products.
int64_t low_rank_weights(const LayerPlan& layer, const PlanShape& shape);

/// Share of the weights of a layer (of all layers) that a token does not read. Threshold groups have no fixed
/// share: they count by the keep that is expected of them. What low-rank products read counts as read.
double weight_sparsity(const LayerPlan& layer, const PlanShape& shape);
double weight_sparsity(const Plan& plan, const PlanShape& shape);
/// Share of the entries of a site that are dropped in a layer (the mean over the groups that read it).
double site_sparsity(const LayerPlan& layer, Site site, const PlanShape& shape);
/// Its mean over the layers.
double site_sparsity(const Plan& plan, Site site, const PlanShape& shape);

}  // namespace larosa
