// Top-K of the activations as they are: no rotation, no calibration.
#include "calib/methods.h"

namespace larosa {

extern const Method kTopk;
const Method kTopk = {"topk", "per-token Top-K without rotation", [](const Choice&) { return Wants{}; },
                      [](const BasisTask&) { return Bases{}; },
                      [](const LayerTask& task) { return topk_layer(task, {}); }};

}  // namespace larosa
