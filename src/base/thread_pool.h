// A pool of workers for loops whose parts are known beforehand. Work is handed out by index, never by
// arrival, so results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace larosa {

class ThreadPool {
 public:
  /// `threads` counts the caller; 0 means one per available core (the process's affinity mask).
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Runs task(thread) once for every thread in [0, size()); returns when all have ended. The first exception
  /// of a task is rethrown here. Calls do not nest.
  void run(const std::function<void(int thread)>& task);

  /// Runs body(begin, end) over [0, count) cut into at most size() even, contiguous parts whose bounds are
  /// multiples of `grain` (the last one may be shorter).
  void split(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

  /// Runs body(i) for every i in [0, count), each on whichever thread is free. For bodies that write to
  /// places of their own only.
  void each(int64_t count, const std::function<void(int64_t i)>& body);

  /// Cores this process may use.
  static int available_cores();

 private:
  void work(int thread);

  std::vector<std::thread> workers_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic_flag error_set_ = ATOMIC_FLAG_INIT;
};

}  // namespace larosa
