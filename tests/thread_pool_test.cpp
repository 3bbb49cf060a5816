// The pool: every part runs once, parts are even, exceptions arrive, idle workers sleep and wake.
#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <stdexcept>
#include <vector>

namespace larosa {
namespace {

TEST(ThreadPool, EveryThreadRunsOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    std::vector<int> runs(static_cast<size_t>(threads));
    for (int repeat = 0; repeat < 2000; ++repeat) pool.run([&](int t) { ++runs[static_cast<size_t>(t)]; });
    for (int count : runs) EXPECT_EQ(count, 2000);
  }
}

TEST(ThreadPool, SplitCoversEvenly) {
  for (const int threads : {1, 2, 3, 4}) {
    ThreadPool pool(threads);
    for (const int64_t count : {0, 1, 5, 64, 1000}) {
      for (const int64_t grain : {1, 16}) {
        std::vector<int> hits(static_cast<size_t>(count));
        std::atomic<int64_t> largest{0};
        pool.split(count, grain, [&](int64_t begin, int64_t end) {
          EXPECT_EQ(begin % grain, 0);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
          int64_t seen = largest.load();
          while (seen < end - begin && !largest.compare_exchange_weak(seen, end - begin)) {
          }
        });
        for (int h : hits) EXPECT_EQ(h, 1);
        EXPECT_LE(largest.load(), ((count + grain - 1) / grain + threads - 1) / threads * grain);
      }
    }
  }
}

TEST(ThreadPool, EachCoversOnce) {
  ThreadPool pool(3);
  std::vector<int> hits(1000);
  pool.each(1000, [&](int64_t i) { ++hits[static_cast<size_t>(i)]; });
  for (int h : hits) EXPECT_EQ(h, 1);
}

TEST(ThreadPool, FirstExceptionArrivesAndThePoolLivesOn) {
  ThreadPool pool(3);
  for (int thrower = 0; thrower < 3; ++thrower) {
    const auto throwing = [&] {
      pool.run([&](int t) {
        if (t == thrower) throw std::runtime_error("part failed");
      });
    };
    EXPECT_THROW(throwing(), std::runtime_error);
    int64_t sum = 0;
    pool.each(1, [&](int64_t) { sum = 1; });
    EXPECT_EQ(sum, 1);
  }
}

/// The worker's own processor time stands still: that of the whole process also counts what a sanitizer does,
/// and a busy machine puts the end of the spinning off.
TEST(ThreadPool, IdleWorkersSleepAndWake) {
  ThreadPool pool(2);
  clockid_t worker = 0;
  pool.run([&](int thread) {
    if (thread == 1) {
      EXPECT_EQ(pthread_getcpuclockid(pthread_self(), &worker), 0);
    }
  });
  const auto worker_time = [&] {
    timespec now;
    EXPECT_EQ(clock_gettime(worker, &now), 0);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
  };
  double spent = 1;
  for (int attempt = 0; attempt < 50 && spent > 0.001; ++attempt) {
    const double before = worker_time();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    spent = worker_time() - before;
  }
  EXPECT_LE(spent, 0.001);
  std::atomic<int> runs{0};
  pool.run([&](int) { ++runs; });
  EXPECT_EQ(runs, 2);
}

/// Neither side may miss the other when it goes to sleep just then: pauses around the time of looking, and
/// more threads than cores, which hardly look.
TEST(ThreadPool, NobodyIsLeftAsleep) {
  for (const int threads : {2, ThreadPool::available_cores() + 2}) {
    ThreadPool pool(threads);
    std::atomic<int> runs{0};
    for (int repeat = 0; repeat < 300; ++repeat) {
      const auto pause = std::chrono::microseconds(repeat % 10 * 15);
      std::this_thread::sleep_for(pause);
      pool.run([&](int thread) {
        if (thread == repeat % threads) std::this_thread::sleep_for(pause);
        ++runs;
      });
    }
    EXPECT_EQ(runs, 300 * threads);
  }
}

}  // namespace
}  // namespace larosa
