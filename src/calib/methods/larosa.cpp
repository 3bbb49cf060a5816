// LaRoSA (arXiv 2507.01299): one orthogonal basis per layer from the principal components of its inputs, then
// per-token Top-K in that basis. Beyond the paper: the basis from h1 and h3 pooled, the attention output in a
// basis per KV head (exact and free: attention weights are scalars per token), norm scores.
#include "calib/methods.h"

namespace larosa {
namespace {

constexpr double kDamping = 0.01;  // of the mean diagonal, as the released code

Wants wants(const Choice& choice) {
  return {
      .stream = true, .mlp = choice.source == Source::separate, .heads = choice.rotate_h2, .moments = true};
}

Bases bases(const BasisTask& task) {
  Bases bases;
  const Moments& moments = task.moments;
  if (!moments.h1.empty()) {
    Matrix sum = moments.h1;
    if (task.choice.source == Source::pooled) {
      for (size_t i = 0; i < sum.data.size(); ++i) sum.data[i] += moments.h3.data[i];
    }
    bases.stream = eigenbasis(sum, kDamping, task.algebra);
    if (task.choice.source == Source::separate) bases.mlp = eigenbasis(moments.h3, kDamping, task.algebra);
  }
  for (const Matrix& head : moments.heads) bases.heads.push_back(eigenbasis(head, kDamping, task.algebra));
  return bases;
}

LayerPlan plan(const LayerTask& task) {
  const bool at_run_time = task.choice.form == Form::simulate;
  return topk_layer(task, {at_run_time, at_run_time && task.choice.rotate_h2, at_run_time, false});
}

}  // namespace

extern const Method kLarosa;
const Method kLarosa = {
    "larosa", "layerwise rotation and per-token Top-K", wants, bases, plan, Allocation::lagrangian};

}  // namespace larosa
