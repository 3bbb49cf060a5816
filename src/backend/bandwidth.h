// The machine's read bandwidth: what a decoding product is measured against.
#pragma once

#include <cstdint>

namespace larosa {

class ThreadPool;

/// GB/s (10^9) at which all threads of the pool together read `bytes` of memory, the faster of two ways (as
/// the process's first call finds), one stream a thread or eight side by side: median of five passes, since
/// where other guests share the memory, the best one is a moment that no product has for itself. Take `bytes`
/// well beyond the caches (512 MiB). Needs that much memory.
double measure_read_bandwidth(ThreadPool& pool, int64_t bytes);

}  // namespace larosa
