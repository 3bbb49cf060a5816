// The architecture table. A new family is a file in arch/ and a row here.
#include <array>
#include <string>

#include "base/error.h"
#include "model/arch/families.h"

namespace larosa {
namespace {

constexpr std::array<const Architecture*, 6> kArchitectures = {&kLlama, &kMistral,     &kQwen2,
                                                               &kQwen3, &kSparseLlama, &kBamboo};

}  // namespace

const Architecture& find_architecture(const std::string& model_type, const std::string& source) {
  std::string known;
  for (const Architecture* row : kArchitectures) {
    if (model_type == row->model_type) return *row;
    known += (known.empty() ? "" : ", ") + std::string(row->model_type);
  }
  fail(source, ": model_type is ", shown(model_type), ", known are ", known);
}

}  // namespace larosa
