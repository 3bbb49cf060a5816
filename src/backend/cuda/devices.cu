#include "backend/devices.h"

#include <cuda_runtime.h>

namespace larosa {

std::vector<Device> cuda_devices(std::string& reason) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    reason = cudaGetErrorString(error);
    return {};
  }
  std::vector<Device> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    size_t free = 0, total = 0;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess || cudaSetDevice(i) != cudaSuccess ||
        cudaMemGetInfo(&free, &total) != cudaSuccess) {
      reason = "cuda:" + std::to_string(i) + ": " + cudaGetErrorString(cudaGetLastError());
      return devices;
    }
    devices.push_back({"cuda:" + std::to_string(i), properties.name, static_cast<int64_t>(total),
                       static_cast<int64_t>(free), properties.major, properties.minor});
  }
  if (devices.empty()) reason = "no device";
  return devices;
}

}  // namespace larosa
