#include "backend/bandwidth.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "base/huge_pages.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

constexpr int64_t kLine = 16;  // 64-bit words summed side by side: two cache lines

/// Integer sums: no order to keep, so the compiler vectorises them and only memory is in the way.
uint64_t sum(const uint64_t* words, int64_t begin, int64_t end) {
  uint64_t lanes[kLine] = {};
  for (int64_t i = begin; i + kLine <= end; i += kLine) {
    for (int64_t s = 0; s < kLine; ++s) lanes[s] += words[i + s];
  }
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;
  return total;
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool, int64_t bytes) {
  const int64_t words = std::max<int64_t>(bytes / 8, kLine);
  const HugePages pages(words * 8);
  auto* memory = reinterpret_cast<uint64_t*>(pages.data());
  pool.split(words, kLine, [&](int64_t begin, int64_t end) { std::fill(memory + begin, memory + end, 1); });
  std::array<double, 5> rates{};
  for (double& rate : rates) {
    std::vector<uint64_t> totals(static_cast<size_t>(pool.size()));
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      const int64_t begin = words * thread / pool.size(), end = words * (thread + 1) / pool.size();
      totals[static_cast<size_t>(thread)] = sum(memory, begin, end);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    volatile uint64_t keep = totals[0];  // the sums are wanted
    (void)keep;
    rate = static_cast<double>(words) * 8e-9 / seconds.count();
  }
  std::ranges::sort(rates);
  return rates[rates.size() / 2];
}

}  // namespace larosa
