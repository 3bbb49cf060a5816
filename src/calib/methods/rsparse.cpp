// R-Sparse (arXiv 2504.19449): a projection reads the channels whose |x_i|·‖W_i‖ is above a cut, the quantile
// on the calibration text; what it drops goes through the nearest product of low rank. Both share the
// projection's bytes: `mix` of them are channels.
#include <algorithm>

#include "base/error.h"
#include "calib/methods.h"

namespace larosa {
namespace {

/// Group `g` of the layer is projection p alone.
Group group_of(const LayerTask& task, Projection p, size_t g) {
  const int64_t in = projection_in(task.config, p), out = projection_out(task.config, p);
  const double budget = 1 - task.levels[static_cast<size_t>(p)], level = 1 - budget * task.choice.mix;
  Group group{{p}, {}};
  group.rule.select = Select::threshold;
  group.rule.scaled = true;
  group.rule.keep = keep_of(in, level);
  const double left = budget * static_cast<double>(in * out) - static_cast<double>(group.rule.keep * out);
  group.rank = std::clamp<int64_t>(static_cast<int64_t>(left) / (in + out), 0, std::min(in, out));
  if (task.magnitudes) {
    const Magnitudes& seen = task.magnitudes->scores[g];
    group.rule.cut = seen.quantile(level);
    group.rule.keep = keep_of(in, 1.0 - seen.share_above(group.rule.cut));
  }
  return group;
}

LayerPlan plan(const LayerTask& task) {
  if (task.choice.allocation != Allocation::uniform)
    fail("--allocation: method rsparse has the same ranks in every layer");
  if (!(task.choice.mix > 0 && task.choice.mix <= 1))
    fail("--mix ", task.choice.mix, ": expected a number above 0, at most 1");
  LayerPlan layer;
  for (const Projection p : kProjections) layer.groups.push_back(group_of(task, p, layer.groups.size()));
  return layer;
}

}  // namespace

extern const Method kRsparse;
const Method kRsparse = {"rsparse", "a cut per projection, and a product of low rank for what it drops",
                         [](const Choice&) { return Wants{.magnitudes = true, .mix = true}; },
                         [](const BasisTask&) { return Bases{}; }, plan};

}  // namespace larosa
