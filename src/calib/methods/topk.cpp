// Top-K of the activations as they are: no rotation, no calibration.
#include "calib/methods.h"

namespace larosa {

extern const Method kTopk;
const Method kTopk = {
    "topk", "per-token Top-K without rotation", [](const Choice&) { return Wants{}; },
    [](const Moments&, const Choice&) { return Bases{}; },
    [](const Choice& choice, const std::array<int64_t, 4>& keep) { return topk_layer(choice, keep, {}); }};

}  // namespace larosa
