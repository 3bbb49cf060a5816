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

enum class Select { all, topk, threshold };

/// How one activation vector is thinned before a group of projections reads it.
struct Rule {
  Select select = Select::all;
  int64_t keep =
      0;          // topk: entries kept per token; threshold: on average when the cut was chosen, 0: unknown
  float cut = 0;  // threshold: entries with score above it are kept
  bool scaled = false;  // the score is |x_i|·scale_i, else |x_i|; tensor "layers.L.<first projection>.scale"
  bool rotated = false;  // thinned in a run-time basis: h ← select(h B) Bᵀ; tensor "layers.L.<first>.basis"
  bool operator==(const Rule&) const = default;
};

/// Projections that share a rule (and so a selection). All read the same site.
struct Group {
  std::vector<Projection> projections;
  Rule rule;
  bool operator==(const Group&) const = default;
};

struct LayerPlan {
  std::vector<Group> groups;  // every projection exactly once, in the order of the arithmetic
  bool adapter = false;       // the stream changes basis after this layer: tensor "layers.L.adapter"
  bool middle = false;        // and between attention and MLP: tensor "layers.L.middle"
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
/// True when some group of the layer is not read whole.
bool thins(const LayerPlan& layer);
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
/// share a site, keeps are in [1, D], cuts are finite and non-negative, and the number of layers fits.
void validate(const Plan& plan, const PlanShape& shape, const std::string& source);

/// Share of the weights of a layer (of all layers) that a token does not read. Threshold groups have no fixed
/// share: they count by the keep that is expected of them.
double weight_sparsity(const LayerPlan& layer, const PlanShape& shape);
double weight_sparsity(const Plan& plan, const PlanShape& shape);
/// Share of the entries of a site that are dropped in a layer (the mean over the groups that read it).
double site_sparsity(const LayerPlan& layer, Site site, const PlanShape& shape);

}  // namespace larosa
