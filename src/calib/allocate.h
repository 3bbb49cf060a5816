// How a budget of weight bytes is shared out: within a layer, or over all layers and groups.
#pragma once

#include <functional>

#include "calib/methods.h"

namespace larosa {

/// Levels of the groups of one layer's `outline` that drop `sparsity` of its weights: from 0, steps of equal
/// weight bytes, each on the group where it adds least to `error` (TEAL, arXiv 2408.14690 alg. 1; a cost is
/// asked for again only when it comes first, since costs grow with what is dropped already: a fifth of the
/// calls). No level exceeds kMostSparse. Throws Error when sparsity does.
Levels greedy_levels(const ModelConfig& config, const LayerPlan& outline, double sparsity,
                     const std::function<double(const Levels&)>& error);

}  // namespace larosa
