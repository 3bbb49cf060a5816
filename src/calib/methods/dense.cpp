// Every channel is read, but for what the model was trained not to: the model in our layout, the baseline of
// all others.
#include "calib/methods.h"
#include "model/model.h"

namespace larosa {

extern const Method kDense;
const Method kDense = {"dense", "keep everything", [](const Choice&) { return Wants{}; },
                       [](const BasisTask&) { return Bases{}; },
                       [](const LayerTask& task) { return trained_layer(task.config); }};

}  // namespace larosa
