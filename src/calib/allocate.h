// How a budget of weight bytes is shared out: within a layer, or over all layers and groups.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "calib/methods.h"

namespace larosa {

/// Weights of a group's projections.
double group_weights(const ModelConfig& config, const Group& group);
void set_level(Levels& levels, const Group& group, double level);

/// Levels of the groups of one layer's `outline` that drop `sparsity` of its weights: from 0, steps of equal
/// weight bytes, each on the group where it adds least to `error` (TEAL, arXiv 2408.14690 alg. 1; a cost is
/// asked for again only when it comes first, since costs grow with what is dropped already: a fifth of the
/// calls). No level exceeds kMostSparse. Throws Error when sparsity does.
Levels greedy_levels(const ModelConfig& config, const LayerPlan& outline, double sparsity,
                     const std::function<double(const Levels&)>& error);

/// What dropping entries of one group costs: errors[i] at kCurveLevels[i].
struct Curve {
  double weight = 1;  // weights of the group's projections
  std::vector<double> errors;
};
inline constexpr std::array<double, 7> kCurveLevels = {0.2, 0.35, 0.5, 0.65, 0.8, 0.9, kMostSparse};

/// The level of every curve that makes the sum of errors least while `sparsity` of the weights is dropped:
/// one Lagrange multiplier, the price of a weight, at which every curve stops. Curves are made convex first
/// (pool adjacent violators on their slopes) and start at (0, 0); between the middles of its segments a
/// curve's slope is taken to be linear, so that levels move smoothly with the price. Throws Error when
/// sparsity exceeds kMostSparse.
std::vector<double> lagrangian_levels(const std::vector<Curve>& curves, double sparsity);

/// The site_scale of uniform_levels that makes the sum of errors least, levels being the same in every layer:
/// the curves of a site are added up, and lagrangian_levels shares the budget out over the four sums; then
/// `shrink` of the way back to ones. In thousandths, so that who names them gets the same plan. curves: one
/// for each group of layer after layer.
std::array<double, 4> search_site_scale(const std::vector<LayerPlan>& layers,
                                        const std::vector<Curve>& curves, double sparsity, double shrink);

}  // namespace larosa
