// The accelerators of this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace larosa {

struct Device {
  std::string name;              // "cuda:0"
  std::string model;             // "NVIDIA H200"
  int64_t memory = 0, free = 0;  // bytes
  int major = 0, minor = 0;      // compute capability
};

/// CUDA devices in the driver's order; empty where there is none, no driver, or a build without CUDA.
/// `reason` says why then, in one line.
std::vector<Device> cuda_devices(std::string& reason);

}  // namespace larosa
