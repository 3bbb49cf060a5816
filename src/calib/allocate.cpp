#include "calib/allocate.h"

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace larosa {
namespace {

// Of a layer's weights; TEAL's 0.05 of q is 0.4 % of a Llama-2-7B layer, 0.5 % of mix-88m's.
constexpr double kStep = 0.005;
constexpr double kRounding = 1e-9;  // shares that are as good as none

/// Share of the layer's weights that a group's projections have.
std::vector<double> group_shares(const ModelConfig& config, const LayerPlan& layer) {
  std::vector<double> shares;
  for (const Group& group : layer.groups) {
    double weights = 0;
    for (const Projection p : group.projections)
      weights +=
          static_cast<double>(projection_in(config, p)) * static_cast<double>(projection_out(config, p));
    shares.push_back(weights / static_cast<double>(layer_weights(config)));
  }
  return shares;
}

void set_level(Levels& levels, const Group& group, double level) {
  for (const Projection p : group.projections) levels[static_cast<size_t>(p)] = level;
}

}  // namespace

Levels greedy_levels(const ModelConfig& config, const LayerPlan& outline, double sparsity,
                     const std::function<double(const Levels&)>& error) {
  if (!(sparsity >= 0 && sparsity <= kMostSparse))
    fail("--sparsity ", sparsity, ": expected a number in [0, ", kMostSparse, "]");
  const std::vector<double> shares = group_shares(config, outline);
  struct Step {
    double size = 0;     // share of the layer's weights
    double error = 0;    // the layer's, after it
    double cost = 0;     // what it adds to the error, per weight: the last step of a group may be smaller
    bool fresh = false;  // nothing was dropped since it was measured
  };
  std::vector<Step> steps(shares.size());
  std::vector<double> reached(shares.size());
  Levels levels{};
  double now = 0, left = sparsity;
  const auto room = [&](size_t g) { return kMostSparse * shares[g] - reached[g]; };
  const auto measure = [&](size_t g) {
    const double size = std::min({kStep, left, room(g)});
    Levels raised = levels;
    set_level(raised, outline.groups[g], (reached[g] + size) / shares[g]);
    const double after = error(raised);
    steps[g] = {size, after, (after - now) / size, true};
  };
  while (left > kRounding) {
    size_t best = shares.size();
    for (size_t g = 0; g < shares.size(); ++g) {
      if (room(g) > kRounding && (best == shares.size() || steps[g].cost < steps[best].cost)) best = g;
    }
    if (best == shares.size()) break;
    if (!steps[best].fresh) {
      measure(best);
      continue;
    }
    reached[best] += steps[best].size;
    left -= steps[best].size;
    now = steps[best].error;
    set_level(levels, outline.groups[best], reached[best] / shares[best]);
    for (Step& step : steps) step.fresh = false;
  }
  return levels;
}

}  // namespace larosa
