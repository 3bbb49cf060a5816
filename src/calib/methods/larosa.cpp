// LaRoSA (arXiv 2507.01299): one orthogonal basis per layer from the principal components of its inputs, then
// per-token Top-K in that basis. Beyond the paper: the basis from h1 and h3 pooled, the attention output in a
// basis per KV head (exact and free: attention weights are scalars per token), norm scores.
#include "calib/methods.h"

namespace larosa {
namespace {

constexpr double kDamping = 0.01;  // of the mean diagonal, as the released code

Wants wants(const Choice& choice) {
  return {true, choice.rotate_h2};
}

Bases bases(const Moments& moments, const Choice& choice) {
  Bases bases;
  Matrix sum = moments.h1;
  if (choice.pool) {
    for (size_t i = 0; i < sum.data.size(); ++i) sum.data[i] += moments.h3.data[i];
  }
  bases.stream = eigenbasis(sum, kDamping);
  for (const Matrix& head : moments.heads) bases.heads.push_back(eigenbasis(head, kDamping));
  return bases;
}

LayerPlan plan(const LayerTask& task) {
  const bool at_run_time = task.choice.form == Form::simulate;
  return topk_layer(task, {at_run_time, at_run_time && task.choice.rotate_h2, at_run_time, false});
}

}  // namespace

extern const Method kLarosa;
const Method kLarosa = {"larosa", "layerwise rotation and per-token Top-K", wants, bases, plan};

}  // namespace larosa
