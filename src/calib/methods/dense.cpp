// Every channel is read: the model in our layout, the baseline of all others.
#include "calib/methods.h"

namespace larosa {

extern const Method kDense;
const Method kDense = {"dense", "keep everything", [](const Choice&) { return Wants{}; },
                       [](const BasisTask&) { return Bases{}; },
                       [](const LayerTask&) { return dense_layer(); }};

}  // namespace larosa
