#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <csignal>
#include <exception>

namespace larosa {
namespace {

// Looking this often (some 50 µs on Zen 4) covers the gaps between the operations of one token, a few µs
// each, so that a worker rarely has to be woken by the kernel (30-60 µs). Longer would steal the core from
// other programs; where there are more threads than cores, so would any looking.
constexpr int kSpins = 4000, kSpinsCrowded = 10;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Sequentially consistent on both sides: either raise() sees the sleeper or the sleeper the new number.
void Signal::raise() {
  value_.store(value_.load(std::memory_order_relaxed) + 1);
  if (sleepers_.load() != 0) value_.notify_all();
}

void Signal::wait_while(uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value() != old) return;
    pause();
  }
  sleepers_.fetch_add(1);
  value_.wait(old);
  sleepers_.fetch_sub(1);
}

int ThreadPool::available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int threads) : size_(threads > 0 ? threads : available_cores()) {
  spins_ = size_ <= available_cores() ? kSpins : kSpinsCrowded;
  workers_ = std::make_unique<Worker[]>(static_cast<size_t>(size_ - 1));
  for (int t = 1; t < size_; ++t) {
    Worker& worker = workers_[static_cast<size_t>(t - 1)];
    worker.thread = std::thread([this, &worker, t] { work(worker, t); });
  }
}

ThreadPool::~ThreadPool() {
  task_ = nullptr;
  start_.raise();
  for (int t = 1; t < size_; ++t) workers_[static_cast<size_t>(t - 1)].thread.join();
}

void ThreadPool::work(Worker& self, int thread) {
  // Signals are for the caller's threads: a handler must not run on top of a kernel (progress.h).
  sigset_t all;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  for (uint32_t seen = 0;; ++seen) {
    start_.wait_while(seen, spins_);
    if (task_ == nullptr) return;
    try {
      (*task_)(thread);
    } catch (...) {
      if (!error_set_.test_and_set()) error_ = std::current_exception();
    }
    self.done.raise();
  }
}

void ThreadPool::run(FunctionRef<void(int)> task) {
  if (size_ == 1) return task(0);
  task_ = &task;
  const uint32_t before = start_.value();
  start_.raise();
  std::exception_ptr own;
  try {
    task(0);
  } catch (...) {
    own = std::current_exception();
  }
  for (int t = 1; t < size_; ++t) workers_[static_cast<size_t>(t - 1)].done.wait_while(before, spins_);
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
