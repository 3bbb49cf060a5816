// One way to launch a kernel, for .cu files. tests/emulation has another one.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "backend/cuda/kernels.h"

namespace larosa::cuda {

/// True when it was compiled for compute capability 9.0 or more.
template <class... Params>
bool may_depend(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "kernel");
  return attributes.ptxVersion >= 90;
}

// A dependent launch puts its blocks where there is room, two on one multiprocessor and none on another if it
// comes to that: on 66 of an H200's 132 then, and half of the bandwidth is lost. So a block takes more than
// half of what a multiprocessor has for blocks.
inline int64_t shared_alone(const Stream& s) {
  return std::min<int64_t>(68 << 10, s.shared_bytes);
}

/// cluster: so many blocks side by side reach each other's shared memory (compute capability 9.0).
template <class... Params>
void launch_clusters(const Stream& s, void (*kernel)(Params...), unsigned cluster, dim3 blocks, dim3 threads,
                     int64_t shared, const Params&... params) {
  // A multiprocessor divides its memory anew where a kernel wants another share for blocks: attention did,
  // between products (7B's layers at 50 %: 1217 tokens/s, 1227 when all want the same). The rest is cache,
  // which loads on their way need: with 132 of 228 KB for blocks 979 tokens/s dense, with 164 964, int8 1455
  // and 1377. The longest row of registers takes 120 KB, 200 where it is normed too.
  // With a smaller memory a product's block takes a larger share.
  constexpr int kShare = 57;
  static std::mutex mutex;                             // engines of several threads launch the same kernels
  static std::set<std::pair<int, const void*>> asked;  // kernels of these parameters
  const void* const function = reinterpret_cast<const void*>(kernel);
  {
    const std::lock_guard lock(mutex);
    if (asked.emplace(s.device, function).second) {
      const auto alone = static_cast<int>(100 * shared_alone(s) / (s.shared_bytes + kStaticShared));
      if (s.dependent)
        check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   std::max(kShare, alone + 1)),
              "shared memory");
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, s.shared_bytes),
            "shared memory");
    }
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = s.stream;
  config.attrs = attributes;
  config.numAttrs = s.dependent ? (cluster > 1 ? 2 : 1) : 0;
  check(cudaLaunchKernelEx(&config, kernel, params...), "launch");
}
template <class... Params>
void launch_kernel(const Stream& s, void (*kernel)(Params...), dim3 blocks, dim3 threads, int64_t shared,
                   const Params&... params) {
  launch_clusters(s, kernel, 1, blocks, threads, shared, params...);
}

}  // namespace larosa::cuda
