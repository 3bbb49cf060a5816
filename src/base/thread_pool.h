// A pool of workers for loops whose parts are known beforehand. Which thread computes a part never
// decides what is computed, so results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace larosa {

/// A callable that outlives the call it is passed to. Unlike std::function it never allocates.
template <class Signature>
class FunctionRef;
template <class... Args>
class FunctionRef<void(Args...)> {
 public:
  template <class Callable,
            class = std::enable_if_t<!std::is_same_v<std::remove_cvref_t<Callable>, FunctionRef>>>
  FunctionRef(Callable&& callable)  // NOLINT(google-explicit-constructor): lambdas are passed as they are
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
        call_([](void* object, Args... args) {
          (*static_cast<std::remove_reference_t<Callable>*>(object))(args...);
        }) {}
  void operator()(Args... args) const { call_(object_, args...); }

 private:
  void* object_;
  void (*call_)(void*, Args...);
};

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
  void run(FunctionRef<void(int thread)> task);

  /// Runs body(begin, end) over [0, count) cut into at most size() even, contiguous parts whose bounds are
  /// multiples of `grain` (the last one may be shorter).
  void split(int64_t count, int64_t grain, FunctionRef<void(int64_t begin, int64_t end)> body);

  /// Runs body(i) for every i in [0, count), each on whichever thread is free. For bodies that write to
  /// places of their own only.
  void each(int64_t count, FunctionRef<void(int64_t i)> body);

  /// Cores this process may use.
  static int available_cores();

 private:
  void work(int thread);

  std::vector<std::thread> workers_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  const FunctionRef<void(int)>* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic_flag error_set_ = ATOMIC_FLAG_INIT;
};

}  // namespace larosa
