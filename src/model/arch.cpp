// The table of architectures. A new family with the known block is a file in arch/ and a row here.
#include <array>

#include "base/error.h"
#include "model/weights.h"

namespace larosa {

extern const Architecture kLlama, kMistral, kQwen2, kQwen3;

const Architecture& find_architecture(const std::string& model_type, const std::string& source) {
  static const std::array<const Architecture*, 4> table = {&kLlama, &kMistral, &kQwen2, &kQwen3};
  std::string known;
  for (const Architecture* row : table) {
    if (model_type == row->model_type) return *row;
    known += (known.empty() ? "" : ", ") + std::string(row->model_type);
  }
  fail(source, ": model_type \"", model_type, "\" is not supported (known: ", known, ")");
}

}  // namespace larosa
