#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <csignal>
#include <exception>

namespace larosa {
namespace {

// Spinning this long covers the gaps between the operations of one token (a few µs each), so that a worker
// rarely has to be woken by the kernel (30-60 µs). Longer would steal the core from other programs.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Value>
void wait_while(const std::atomic<Value>& value, Value old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

int ThreadPool::available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = available_cores();
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::work(int thread) {
  // Signals are for the caller's threads: a handler must not run on top of a kernel (progress.h).
  sigset_t all;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  uint32_t seen = 0;
  for (;;) {
    wait_while(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    try {
      (*task_)(thread);
    } catch (...) {
      if (!error_set_.test_and_set()) error_ = std::current_exception();
    }
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
  }
}

void ThreadPool::run(FunctionRef<void(int)> task) {
  if (workers_.empty()) return task(0);
  task_ = &task;
  pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  std::exception_ptr own;
  try {
    task(0);
  } catch (...) {
    own = std::current_exception();
  }
  for (int left = pending_.load(std::memory_order_acquire); left != 0;
       left = pending_.load(std::memory_order_acquire)) {
    wait_while(pending_, left);
  }
  const std::exception_ptr error = own ? own : error_;
  error_ = nullptr;
  error_set_.clear();
  if (error) std::rethrow_exception(error);
}

void ThreadPool::split(int64_t count, int64_t grain, FunctionRef<void(int64_t, int64_t)> body) {
  const int64_t units = (count + grain - 1) / grain;
  run([&](int thread) {
    const int64_t begin = units * thread / size() * grain;
    const int64_t end = std::min(count, units * (thread + 1) / size() * grain);
    if (begin < end) body(begin, end);
  });
}

void ThreadPool::each(int64_t count, FunctionRef<void(int64_t)> body) {
  std::atomic<int64_t> next{0};
  run([&](int) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  });
}

}  // namespace larosa
