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

/// A number that one thread raises while others wait for it to change: they look for a while, then sleep. On
/// a cache line of its own, so that nobody's looking slows down another's writing; the system is called only
/// when somebody sleeps.
class alignas(64) Signal {
 public:
  void raise();
  /// Returns once the number differs from `old`; `spins`: how often to look before sleeping.
  void wait_while(uint32_t old, int spins);
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

 private:
  std::atomic<uint32_t> value_{0}, sleepers_{0};
};

class ThreadPool {
 public:
  /// `threads` counts the caller; 0 means one per available core (the process's affinity mask).
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

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
  struct Worker {
    Signal done;  // as often as the worker has finished a task
    std::thread thread;
  };
  void work(Worker& self, int thread);

  Signal start_;                                  // as often as a task was given out
  const FunctionRef<void(int)>* task_ = nullptr;  // null: the end
  std::unique_ptr<Worker[]> workers_;
  int size_ = 1, spins_ = 0;
  std::exception_ptr error_;
  std::atomic_flag error_set_ = ATOMIC_FLAG_INIT;
};

}  // namespace larosa
