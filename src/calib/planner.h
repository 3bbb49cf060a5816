// From statistics to plans: what a layer's plan needs to know of the calibration text is found here, through
// the interpreter that runs the plan later.
#pragma once

#include "calib/allocate.h"
#include "calib/methods.h"
#include "calib/statistics.h"

namespace larosa {

/// True when a layer's plan depends on what reaches it.
bool plans_by_text(const Method& method, const Choice& choice);

/// The plan of a layer that stands where `calibration` has come to. `layer`: as its outline (method.plan
/// without statistics) was folded, in float32. `task`: levels as uniform ones, no magnitudes.
LayerPlan find_plan(const Method& method, LayerTask task, Layer& layer, Calibration& calibration);

/// What each group of the layer costs its output alone, the others read whole, by the currency of `choice`.
/// The layer as for find_plan.
std::vector<Curve> find_curves(const Method& method, LayerTask task, Layer& layer, Calibration& calibration);

}  // namespace larosa
