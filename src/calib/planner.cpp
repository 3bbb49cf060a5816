#include "calib/planner.h"

namespace larosa {

bool plans_by_text(const Method& method, const Choice& choice) {
  return method.wants(choice).magnitudes || choice.allocation != Allocation::uniform;
}

std::vector<Curve> find_curves(const Method& method, LayerTask task, Layer& layer, Calibration& calibration) {
  std::vector<Curve> curves;
  Trial trial = calibration.trial(layer, task.layer);
  for (size_t g = 0; g < layer.plan.groups.size(); ++g) {
    Curve curve{group_weights(task.config, layer.plan.groups[g]), {}};
    for (const double level : kCurveLevels) {
      set_level(task.levels, layer.plan.groups[g], level);
      LayerPlan plan = method.plan(task);
      for (size_t other = 0; other < plan.groups.size(); ++other)
        if (other != g) plan.groups[other].rule.select = Select::all;
      const LayerError error = trial.error(plan);
      const bool update = task.choice.currency == Currency::update;
      const bool absolute = task.choice.currency == Currency::absolute;
      curve.errors.push_back(update ? error.update : absolute ? error.absolute : error.relative);
    }
    curves.push_back(std::move(curve));
  }
  return curves;
}

LayerPlan find_plan(const Method& method, LayerTask task, Layer& layer, Calibration& calibration) {
  const bool cuts = method.wants(task.choice).magnitudes;
  LayerMagnitudes seen;
  if (cuts) {
    seen = calibration.magnitudes(layer, task.layer, Pass{true, nullptr});
    task.magnitudes = &seen;
  }
  if (task.choice.allocation == Allocation::greedy) {
    Trial trial = calibration.trial(layer, task.layer);
    task.levels = greedy_levels(task.config, layer.plan, task.choice.sparsity, [&](const Levels& levels) {
      LayerTask candidate = task;
      candidate.levels = levels;
      return trial.error(plan_layer(method, candidate)).relative;
    });
  }
  LayerPlan plan = plan_layer(method, task);
  if (!cuts || task.choice.stream == Stream::dense) return plan;
  // What reaches a site shrinks when the sites before it are thinned. The first one's cuts are right now,
  // and each round makes those of one more site right.
  for (size_t round = 1; round < kSites.size(); ++round) {
    layer.plan = plan;
    seen = calibration.magnitudes(layer, task.layer, Pass{});
    plan = plan_layer(method, task);
  }
  return plan;
}

}  // namespace larosa
