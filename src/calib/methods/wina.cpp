// WINA (arXiv 2505.19427): per-token Top-K of |x_i| times the norm of the weights it meets, in bases where
// the channels of k (attention) and gate (MLP) are orthogonal: the right singular vectors of these weights,
// with the gain folded. No calibration text. Norms of k and gate score their groups; o and down, whose
// channels are not made orthogonal, go by |x_i|. Without the rotation every group is scored by the norms of
// all its original weights.
#include "backend/algebra.h"
#include "calib/methods.h"

namespace larosa {
namespace {

/// Eigenvectors of diag(gain) W^T W diag(gain). Where W has fewer outputs than inputs (k of grouped-query
/// attention) the rest of the basis is any orthonormal completion, with norms of 0.
Matrix orthogonalising(const Weight& weight, const float* gain, Algebra& algebra) {
  Matrix gram(weight.in, weight.in);
  add_gram(weight, gain, gram, algebra);
  return eigenbasis(gram, 0, algebra);
}

Bases bases(const BasisTask& task) {
  const LayerWeights& w = task.weights;
  Bases bases;
  bases.stream = orthogonalising(w[Projection::wk], w.norm_attn, task.algebra);
  bases.mlp = orthogonalising(w[Projection::gate], w.norm_mlp, task.algebra);
  return bases;
}

LayerPlan plan(const LayerTask& task) {
  using enum Projection;
  const bool rotate = task.choice.rotate;
  LayerPlan layer;
  if (rotate) {
    layer.groups = {{{wq, wv}, {}}, {{wk}, {}}, {{wo}, {}}, {{gate}, {}}, {{up}, {}}, {{down}, {}}};
  } else {
    for (const Projection p : kProjections) layer.groups.push_back({{p}, {}});
  }
  for (Group& group : layer.groups) {
    const Projection first = group.projections[0];
    const Site site = site_of(first);
    group.rule = topk_rule(task, first);
    group.rule.scaled = !rotate || first == wk || first == gate;
    group.rule.rotated =
        rotate && task.choice.form == Form::simulate && (site == Site::h1 || site == Site::h3);
  }
  return layer;
}

}  // namespace

extern const Method kWina;
const Method kWina = {"wina", "Top-K by weight norms, where k and gate have orthogonal channels",
                      [](const Choice& choice) {
                        return Wants{.stream = choice.rotate, .mlp = choice.rotate, .rotation = true};
                      },
                      bases, plan};

}  // namespace larosa
