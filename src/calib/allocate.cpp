#include "calib/allocate.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"

namespace larosa {

double group_weights(const ModelConfig& config, const Group& group) {
  double weights = 0;
  for (const Projection p : group.projections)
    weights += static_cast<double>(projection_in(config, p)) * static_cast<double>(projection_out(config, p));
  return weights;
}

void set_level(Levels& levels, const Group& group, double level) {
  for (const Projection p : group.projections) levels[static_cast<size_t>(p)] = level;
}

namespace {

// Of a layer's weights; TEAL's 0.05 of q is 0.4 % of a Llama-2-7B layer, 0.5 % of mix-88m's.
constexpr double kStep = 0.005;
constexpr double kRounding = 1e-9;  // shares that are as good as none

/// Share of the layer's weights that a group's projections have.
std::vector<double> group_shares(const ModelConfig& config, const LayerPlan& layer) {
  std::vector<double> shares;
  for (const Group& group : layer.groups)
    shares.push_back(group_weights(config, group) / static_cast<double>(layer_weights(config)));
  return shares;
}

void check_sparsity(double sparsity) {
  if (!(sparsity >= 0 && sparsity <= kMostSparse))
    fail("--sparsity ", sparsity, ": expected a number in [0, ", kMostSparse, "]");
}

/// A convex curve by its slope: prices[i] is the cost per weight at levels[i], both ascending.
struct Slopes {
  std::vector<double> levels, prices;

  explicit Slopes(const Curve& curve) {
    struct Segment {
      double from, to, error;
      double slope() const { return error / (to - from); }
    };
    std::vector<Segment> convex;
    double level = 0, error = 0;
    for (size_t i = 0; i < curve.errors.size(); ++i) {
      convex.push_back({level, kCurveLevels[i], curve.errors[i] - error});
      level = kCurveLevels[i];
      error = curve.errors[i];
      while (convex.size() > 1 && convex.back().slope() < convex[convex.size() - 2].slope()) {
        const Segment last = convex.back();
        convex.pop_back();
        convex.back().to = last.to;
        convex.back().error += last.error;
      }
    }
    for (const Segment& s : convex) {
      levels.push_back((s.from + s.to) / 2);
      prices.push_back(s.slope() / curve.weight);
    }
  }

  /// Where the curve's cost of a weight reaches the price. Below the first middle the slope falls to 0, above
  /// the last it goes on as before it.
  double level_at(double price) const {
    double level = 0, before = 0;
    for (size_t i = 0; i < levels.size(); ++i) {
      if (price < prices[i]) {
        const double rise = prices[i] - before;
        return level + (levels[i] - level) * (rise > 0 ? (price - before) / rise : 0);
      }
      level = levels[i];
      before = std::max(before, prices[i]);
    }
    const size_t n = levels.size();
    const double rise = n > 1 ? prices[n - 1] - prices[n - 2] : prices[0];
    const double run = n > 1 ? levels[n - 1] - levels[n - 2] : levels[0];
    if (rise <= 0) return kMostSparse;
    return std::min(kMostSparse, level + run * (price - before) / rise);
  }
};

}  // namespace

std::vector<double> lagrangian_levels(const std::vector<Curve>& curves, double sparsity) {
  check_sparsity(sparsity);
  std::vector<Slopes> slopes;
  double total = 0;
  for (const Curve& curve : curves) {
    slopes.emplace_back(curve);
    total += curve.weight;
  }
  const auto dropped = [&](double price) {
    double sum = 0;
    for (size_t i = 0; i < curves.size(); ++i) sum += curves[i].weight * slopes[i].level_at(price) / total;
    return sum;
  };
  double low = 0, high = 1e-30;
  while (dropped(high) < sparsity - kRounding && high < 1e30) high *= 2;
  for (int i = 0; i < 200; ++i) {
    const double middle = 0.5 * (low + high);
    (dropped(middle) < sparsity ? low : high) = middle;
  }
  std::vector<double> levels;
  for (const Slopes& s : slopes) levels.push_back(sparsity > 0 ? s.level_at(high) : 0);
  return levels;
}

std::array<double, 4> search_site_scale(const std::vector<LayerPlan>& layers,
                                        const std::vector<Curve>& curves, double sparsity, double shrink) {
  std::vector<Curve> sites(kSites.size(), Curve{0, std::vector<double>(kCurveLevels.size())});
  auto curve = curves.begin();
  for (const LayerPlan& layer : layers) {
    for (const Group& group : layer.groups) {
      Curve& site = sites[static_cast<size_t>(site_of(group.projections[0]))];
      site.weight += curve->weight;
      for (size_t i = 0; i < site.errors.size(); ++i) site.errors[i] += curve->errors[i];
      ++curve;
    }
  }
  CHECK(curve == curves.end());
  const std::vector<double> levels = lagrangian_levels(sites, sparsity);
  std::array<double, 4> scale{1, 1, 1, 1};
  for (size_t i = 0; sparsity > 0 && i < scale.size(); ++i)
    scale[i] = std::round(1000 * std::lerp(levels[i] / sparsity, 1.0, shrink)) / 1000;
  return scale;
}

Levels greedy_levels(const ModelConfig& config, const LayerPlan& outline, double sparsity,
                     const std::function<double(const Levels&)>& error) {
  check_sparsity(sparsity);
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
