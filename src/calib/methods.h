// Sparsity methods: each says which statistics it wants, in which bases it thins, and writes a layer's plan.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "calib/matrix.h"
#include "model/config.h"
#include "model/weights.h"
#include "plan/plan.h"

namespace larosa {

class Algebra;

/// folded: bases are merged into the weights, what a deployment runs. simulate: the weights stay as they are
/// and the bases are applied at run time; shows what a choice costs in quality without storage rounding.
enum class Form { folded, simulate };
/// What Top-K compares: |x_i|, or |x_i| times the norm of the weights that read it (WINA, arXiv 2505.19427
/// eq. 4).
enum class Score { magnitude, norm };

/// Whose principal components the stream's basis is: of h1 and h3 together, of h1 alone, or one each, with a
/// change of basis between attention and MLP.
enum class Source { pooled, h1, separate };
/// How the budget is shared out. uniform: the same levels in every layer, by site_scale; greedy: within each
/// layer, by what it costs the layer's output (TEAL, arXiv 2408.14690 §4.3); lagrangian: within each layer,
/// or over all in a Currency, by curves of what each group alone costs its layer's output; sites: uniform
/// with a site_scale found by these curves, added up over the layers.
enum class Allocation { uniform, greedy, lagrangian, sites };
inline constexpr std::array<const char*, 4> kAllocationNames = {"uniform", "greedy", "lagrangian",
                                                                "site scales"};
/// What makes errors of different layers comparable: each token's relative to the square of the layer's dense
/// output, or of what the layer adds to the stream, or as they are in the stream that all layers add to; or
/// nothing does, and every layer meets the budget by itself.
enum class Currency { relative, update, absolute, none };
/// What reaches a layer whose cuts are looked for: the stream as the thinned layers before it leave it, so
/// that the budget is met, or the dense model's (TEAL as published, which drops more than asked for).
enum class Stream { thinned, dense };

/// What a method is asked for.
struct Choice {
  double sparsity = 0.5;  // share of the projections' weight bytes not read per token
  std::array<double, 4> site_scale = {1, 1, 1, 1};  // relative sparsity of h1 h2 h3 h4
  Form form = Form::folded;
  Score score = Score::norm;
  Source source = Source::pooled;
  int64_t basis_layers = 1;  // neighbouring layers that share the stream's basis; 0: all
  // λ: the stream's basis is that of H + λ G, H the second moments and G the weights' Gram matrices
  // (Moments), both scaled to a mean diagonal of 1; 0: of H. Measured in docs/results.md, Ablation.
  double basis_weights = 0;
  bool rotate = true;     // wina: in its rotated bases
  bool rotate_h2 = true;  // attention output in a basis per KV head
  Allocation allocation = Allocation::uniform;
  Currency currency = Currency::none;
  // lagrangian, sites: how far their levels go back to the uniform ones, 0 to 1. Half way loses to uniform in
  // one cell of nine, by 0.5 %; 0 is better from 50 % on (demo-7m: 2 % at 50, 6 % at 60 %) but behind uniform
  // levels at 25 % (mix-88m: 0.1 to 1 %; docs/results.md, Allocation).
  double shrink = 0.5;
  Stream stream = Stream::thinned;
  // rsparse: share of a projection's bytes that channels get, the rest is low-rank. Near the mean of the
  // published recipe (0.96); on demo-7m at 50 % perplexity only grows with the rank: 35.7 at 1, 38.2, 41.8 at
  // 0.95, 45.8 at 0.9, and without the low rank of 0.95 it is 42.2.
  double mix = 0.95;
  bool after_gain = false;  // thin after the RMSNorm gain, as the published simulation does (simulate only)
};

/// Second moments Σ xᵀx of one layer's activations, upper triangles; empty where not wanted.
struct Moments {
  Matrix h1, h3;              // (dim, dim)
  Matrix g1, g3;              // (dim, dim): Σ WᵀW of the weights that read h1 (q k v) and h3 (gate up)
  std::vector<Matrix> heads;  // per KV head (head_dim, head_dim): its query heads' attention outputs
};

/// Bases of one layer; empty: not rotated.
struct Bases {
  Matrix stream;              // (dim, dim), columns are the basis vectors of h1 and h3
  Matrix mlp;                 // (dim, dim) those of h3 where it has its own
  std::vector<Matrix> heads;  // per KV head (head_dim, head_dim)

  /// The stream's from the middle of the layer on.
  const Matrix& last() const { return mlp.empty() ? stream : mlp; }
};

struct Wants {
  bool stream = false, mlp = false, heads = false;  // the bases it makes
  bool moments = false;                             // they come from moments, else from weights alone
  bool magnitudes = false;                          // for cuts
  bool rotation = false;                            // its rotation may be switched off, its scores may not
  bool mix = false;                                 // part of its bytes are products of low rank
  bool bases() const { return stream || heads; }
  bool text() const { return moments || magnitudes; }
};

/// What a layer's bases are made from.
struct BasisTask {
  const ModelConfig& config;
  const Choice& choice;
  const LayerWeights& weights;
  const Moments& moments;  // h, g: of all layers that share the basis, empty but for the first of them
  Algebra& algebra;
};

/// Share of the entries that each projection's rule drops; projections of a group share it.
using Levels = std::array<double, 7>;  // by Projection

/// How large the entries of one site are: |x| counted in bins of 1/2048 of an octave.
class Magnitudes {
 public:
  /// |x_i|·scale_i of every row, scale null: ones.
  void add(Mat entries, const float* scale = nullptr);
  /// Least bin edge with at least `level` of the entries at or below it; 0 for less than half an entry.
  /// Throws Error when that is no finite number.
  float quantile(double level) const;
  /// Share of the entries that are larger than `cut`, a bin edge.
  double share_above(float cut) const;

 private:
  std::vector<int64_t> bins_;
  int64_t count_ = 0;
};
/// Of one layer: by Site; of a(gate); and by group, of the scores of groups whose rule is scaled.
struct LayerMagnitudes {
  std::array<Magnitudes, 4> sites;
  Magnitudes neurons;
  std::vector<Magnitudes> scores;
};

/// What a layer's plan is made from.
struct LayerTask {
  const ModelConfig& config;
  const Choice& choice;
  int64_t layer;
  Levels levels;
  const LayerMagnitudes* magnitudes = nullptr;  // for methods that want them; null: an outline is enough
};

/// A row of the methods table.
struct Method {
  const char* name;
  const char* summary;
  Wants (*wants)(const Choice& choice);
  Bases (*bases)(const BasisTask& task);
  LayerPlan (*plan)(const LayerTask& task);
  // Where none is asked for:
  Allocation allocation = Allocation::uniform;
  double basis_weights = 0;
};

std::span<const Method> methods();
/// Throws Error listing the known names.
const Method& find_method(const std::string& name);

/// No site drops a larger share.
inline constexpr double kMostSparse = 0.95;

/// The same levels for every layer, from a sparsity in weight bytes: those of site i are s_i = min(0.95,
/// s·scale_i) with s such that Σ weights_i s_i = sparsity · Σ weights_i (LaRoSA §4.3 with the budget counted
/// in weights). Throws Error when sparsity is outside [0, 0.95] or no s reaches it.
Levels uniform_levels(const ModelConfig& config, double sparsity, const std::array<double, 4>& site_scale);

/// As --site-scale takes it: "0.8,1.2,0.8,1.2".
std::string site_scale_text(const std::array<double, 4>& site_scale);

/// The budget is shared out by error curves.
inline bool by_curves(const Choice& choice) {
  return choice.allocation == Allocation::lagrangian || choice.allocation == Allocation::sites;
}

/// Entries kept of `dim` at a level: round(dim (1 − level)), at least 1.
int64_t keep_of(int64_t dim, double level);

/// True when layer l is the last of those that share the stream's basis with it.
bool ends_basis(const ModelConfig& config, const Choice& choice, int64_t l);

/// Layer l's plan at `levels`: the method's, with adapters where folded bases of the stream change.
LayerPlan plan_layer(const Method& method, const LayerTask& task);

/// What `method` does to a model without looking at a text: every layer at uniform_levels. Names no source
/// model and no calibration. Throws as uniform_levels, and for what the method does not offer.
Plan plan_model(const Method& method, const ModelConfig& config, const Choice& choice);

/// Top-K at p's level, by the score that was asked for.
Rule topk_rule(const LayerTask& task, Projection p);

/// The usual four groups, each thinned by Top-K; `rotated` marks the sites with a run-time basis.
LayerPlan topk_layer(const LayerTask& task, const std::array<bool, 4>& rotated);

}  // namespace larosa
