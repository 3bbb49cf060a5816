// larosa devices: what this machine offers.
#include "backend/devices.h"

#include <cstdio>

#include "command.h"

namespace larosa {

std::function<int()> setup_devices(CLI::App&) {
  return [] {
    ThreadPool pool(0);
    std::printf("cpu     %s\n", make_cpu_backend({}, pool)->describe().c_str());
    std::string reason;
    const auto devices = cuda_devices(reason);
    for (const Device& d : devices) {
      std::printf("%s  %s, compute capability %d.%d, %.1f GiB, %.1f GiB free\n", d.name.c_str(),
                  d.model.c_str(), d.major, d.minor, static_cast<double>(d.memory) / 1073741824.0,
                  static_cast<double>(d.free) / 1073741824.0);
    }
    if (devices.empty()) std::printf("cuda    none: %s\n", reason.c_str());
    return 0;
  };
}

}  // namespace larosa
