// The CPU backend's entry.
#include "backend/backend.h"

namespace larosa {

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions&, ThreadPool&) {
  return make_ref_backend();
}

}  // namespace larosa
