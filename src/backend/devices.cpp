#include "backend/devices.h"

#ifndef LAROSA_CUDA
namespace larosa {

std::vector<Device> cuda_devices(std::string& reason) {
  reason = "built without CUDA (LAROSA_CUDA=OFF)";
  return {};
}

}  // namespace larosa
#endif
