// Tensor names as transformers writes them, the same for every family in arch/.
#pragma once

namespace larosa {
struct TensorNames;
extern const TensorNames kHuggingFaceNames;
}  // namespace larosa
