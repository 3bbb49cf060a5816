#include "calib/outline.h"

#include <algorithm>
#include <sstream>

#include "base/error.h"
#include "calib/sparsify_job.h"
#include "model/model.h"

namespace larosa {
namespace {

/// Bytes of the outline's adapters over those of all projections.
double adapter_share(const SparsifyJob& job) {
  const ModelConfig& config = job.config;
  const LayerWeights weights = load_layer(job.checkpoint, config, 0);
  const StoredTypes& types = job.options.types;
  const DType adapter = types.adapters.value_or(weights[Projection::wo].dtype);
  int64_t one = config.dim * line_bytes(adapter, config.dim);
  if (quantised(adapter)) one += std::min(kAdapterTop, config.dim) * config.dim * dtype_size(DType::f32);
  int64_t adapters = 0, projections = 0;
  for (const LayerPlan& layer : job.plan.layers) {
    adapters += (layer.middle ? one : 0) + (layer.adapter ? one : 0);
    for (const Projection p : kProjections)
      projections += projection_in(config, p) *
                     line_bytes(types.weights.value_or(weights[p].dtype), projection_out(config, p));
  }
  return static_cast<double>(adapters) / static_cast<double>(projections);
}

void write_notes(SparsifyJob& job) {
  const StoredTypes& types = job.options.types;
  const Choice& choice = job.choice;
  const Wants& wants = job.wants;
  auto& notes = job.plan.notes;
  notes["weights"] = type_name(types.weights);
  const auto adapts = [](const LayerPlan& layer) { return layer.adapter || layer.middle; };
  if (std::any_of(job.plan.layers.begin(), job.plan.layers.end(), adapts))
    notes["adapters"] = type_name(types.adapters);
  notes["head"] = type_name(types.head);
  notes["embedding"] = type_name(types.embed);
  if (job.bases_of_weights()) notes["bases"] = "of weights";
  if (wants.moments) {
    notes["pool"] = choice.source == Source::pooled ? "on" : "off";
    if (wants.mlp) notes["bases"] = "separate";
    if (choice.basis_layers != 1) notes["basis_layers"] = std::to_string(choice.basis_layers);
    if (choice.basis_weights > 0) {
      std::ostringstream share;
      share << choice.basis_weights;
      notes["basis_weights"] = share.str();
    }
    notes["rotate_h2"] = choice.rotate_h2 ? "on" : "off";
    notes["gain"] = choice.after_gain ? "before selection" : "after selection";
  }
  if (wants.magnitudes) notes["stream"] = choice.stream == Stream::thinned ? "thinned" : "dense";
  if (types.weights && quantised(*types.weights)) notes["rounding"] = job.gptq ? "gptq" : "nearest";
  if (job.needs_tokens()) {
    notes["calibration"] = job.options.calibration_name;
    notes["calibration_tokens"] = std::to_string(job.tokens.size());
    notes["calibration_window"] = std::to_string(job.window);
  }
}

}  // namespace

void outline_plan(SparsifyJob& job) {
  job.plan = plan_model(job.method, job.config, job.choice);
  if (job.options.count_adapters) {
    job.choice.sparsity += adapter_share(job);
    if (job.choice.sparsity > kMostSparse)
      fail("--budget-includes-adapter: the projections would have to drop ", job.choice.sparsity,
           ", at most ", kMostSparse, " is possible");
    job.plan = plan_model(job.method, job.config, job.choice);
    job.plan.sparsity = job.options.choice.sparsity;
    job.plan.notes["budget"] = "with adapters";
  }
  job.plan.fingerprint = job.checkpoint.fingerprint();
  write_notes(job);
  validate(job.plan, plan_shape(job.config), job.options.source);
}

}  // namespace larosa
