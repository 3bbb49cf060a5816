#include "backend/bandwidth.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <numeric>
#include <vector>

#include "base/huge_pages.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

// In 64-bit words.
constexpr int64_t kStep = 16;    // summed side by side: two cache lines
constexpr int64_t kLine = 8;     // a cache line
constexpr int64_t kAhead = 128;  // 1 KB

// Integer sums: no order to keep, so the compiler vectorises them and only memory is in the way. A share is
// read as one stream, or as several side by side, each fetched 1 KB ahead. Which is faster is the
// processor's business: two threads of an Emerald Rapids read 19 GB/s in one way and 31 in the other.

uint64_t sum(const uint64_t* words, int64_t count) {
  uint64_t lanes[kStep] = {};
  for (int64_t i = 0; i + kStep <= count; i += kStep) {
    for (int64_t s = 0; s < kStep; ++s) lanes[s] += words[i + s];
  }
  return std::accumulate(lanes, lanes + kStep, uint64_t{0});
}

uint64_t sum_side_by_side(const uint64_t* words, int64_t count) {
  constexpr int64_t kStreams = 8;
  uint64_t lanes[kLine] = {};
  const int64_t each = count / kStreams / kLine * kLine;
  for (int64_t i = 0; i < each; i += kLine) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const uint64_t* const line = words + stream * each + i;
      __builtin_prefetch(line + kAhead);
      for (int64_t s = 0; s < kLine; ++s) lanes[s] += line[s];
    }
  }
  return std::accumulate(lanes, lanes + kLine, sum(words + kStreams * each, count - kStreams * each));
}

using Read = uint64_t (*)(const uint64_t*, int64_t);

/// GB/s of `words` 64-bit words, all threads together.
double median_rate(ThreadPool& pool, const uint64_t* memory, int64_t words, Read read) {
  std::array<double, 5> rates{};
  for (double& rate : rates) {
    std::vector<uint64_t> totals(static_cast<size_t>(pool.size()));
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      const int64_t begin = words * thread / pool.size(), end = words * (thread + 1) / pool.size();
      totals[static_cast<size_t>(thread)] = read(memory + begin, end - begin);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    volatile uint64_t keep = totals[0];  // the sums are wanted
    (void)keep;
    rate = static_cast<double>(words) * 8e-9 / seconds.count();
  }
  std::ranges::sort(rates);
  return rates[rates.size() / 2];
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool, int64_t bytes) {
  const int64_t words = std::max<int64_t>(bytes / 8, kStep);
  const HugePages pages((words + kAhead) * 8);
  auto* memory = reinterpret_cast<uint64_t*>(pages.data());
  pool.split(words, kStep, [&](int64_t begin, int64_t end) { std::fill(memory + begin, memory + end, 1); });
  static std::atomic<Read> faster{nullptr};  // asked once: `larosa bench` measures around every row
  if (const Read read = faster) return median_rate(pool, memory, words, read);
  const double one = median_rate(pool, memory, words, sum);
  const double eight = median_rate(pool, memory, words, sum_side_by_side);
  faster = one > eight ? sum : sum_side_by_side;
  return std::max(one, eight);
}

}  // namespace larosa
