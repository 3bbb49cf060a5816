#include "calib/planner.h"

#include "calib/allocate.h"

namespace larosa {

bool plans_by_text(const Method& method, const Choice& choice) {
  return method.wants(choice).magnitudes || choice.allocation != Allocation::uniform;
}

LayerPlan find_plan(const Method& method, LayerTask task, Layer& layer, Calibration& calibration) {
  const bool cuts = method.wants(task.choice).magnitudes;
  SiteMagnitudes seen;
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
