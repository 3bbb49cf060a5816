// LaRoSA (arXiv 2507.01299): one orthogonal basis per layer from the principal components of its inputs, then
// per-token Top-K in that basis. Beyond the paper: the basis from h1 and h3 pooled, and from the weights
// beside them, the attention output in a basis per KV head (exact and free: attention weights are scalars per
// token), norm scores.
#include "calib/methods.h"

namespace larosa {
namespace {

constexpr double kDamping = 0.01;  // of the mean diagonal, as the released code

Wants wants(const Choice& choice) {
  return {
      .stream = true, .mlp = choice.source == Source::separate, .heads = choice.rotate_h2, .moments = true};
}

Matrix sum_of(const Matrix& a, const Matrix& b) {
  Matrix sum = a;
  for (size_t i = 0; i < b.data.size(); ++i) sum.data[i] += b.data[i];
  return sum;
}

/// Of h + share · g, g (empty where none is wanted) scaled to h's trace.
Matrix mixed_basis(Matrix h, const Matrix& g, double share, Algebra& algebra) {
  double data = 0, weights = 0;
  for (int64_t i = 0; i < g.rows; ++i) {
    data += h.row(i)[i];
    weights += g.row(i)[i];
  }
  const double scale = weights > 0 ? share * data / weights : 0;
  for (size_t i = 0; i < g.data.size(); ++i) h.data[i] += scale * g.data[i];
  return eigenbasis(h, kDamping, algebra);
}

Bases bases(const BasisTask& task) {
  Bases bases;
  const Moments& m = task.moments;
  const auto basis = [&](const Matrix& h, const Matrix& g) {
    return mixed_basis(h, g, task.choice.basis_weights, task.algebra);
  };
  if (task.choice.source == Source::separate && !m.h1.empty()) {
    bases.stream = basis(m.h1, m.g1);
    bases.mlp = basis(m.h3, m.g3);
  } else if (!m.h1.empty()) {
    bases.stream =
        basis(task.choice.source == Source::pooled ? sum_of(m.h1, m.h3) : m.h1, sum_of(m.g1, m.g3));
  }
  for (const Matrix& head : m.heads) bases.heads.push_back(eigenbasis(head, kDamping, task.algebra));
  return bases;
}

LayerPlan plan(const LayerTask& task) {
  const bool at_run_time = task.choice.form == Form::simulate;
  return topk_layer(task, {at_run_time, at_run_time && task.choice.rotate_h2, at_run_time, false});
}

}  // namespace

extern const Method kLarosa;
// A share of 0.3: of 0.03 to 1 the least perplexity of mix-88m at 50 % on WikiText-2, and nearly so on
// mix.valid (docs/results.md, Basis from data and weights).
const Method kLarosa = {
    "larosa", "layerwise rotation and per-token Top-K", wants, bases, plan, Allocation::lagrangian, 0.3};

}  // namespace larosa
