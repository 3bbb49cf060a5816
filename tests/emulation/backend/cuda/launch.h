// Stands in for src/backend/cuda/launch.h: a launch runs the grid to its end.
#pragma once

#include "backend/cuda/kernels.h"
#include "backend/cuda/machine.cuh"

namespace larosa::cuda {

template <class... Params>
bool may_depend(void (*)(Params...)) {
  return false;
}

inline int64_t shared_alone(const Stream&) {
  return 0;
}

template <class... Params>
void launch_clusters(const Stream& s, void (*kernel)(Params...), unsigned cluster, dim3 blocks, dim3 threads,
                     int64_t shared, const Params&... params) {
  if (shared > s.shared_bytes) emulation::give_up("a block takes more shared memory than there is");
  emulation::run(blocks, cluster, static_cast<int>(threads.x), shared, [&] { kernel(params...); });
}
template <class... Params>
void launch_kernel(const Stream& s, void (*kernel)(Params...), dim3 blocks, dim3 threads, int64_t shared,
                   const Params&... params) {
  launch_clusters(s, kernel, 1, blocks, threads, shared, params...);
}

}  // namespace larosa::cuda
