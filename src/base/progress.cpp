#include "base/progress.h"

#include <pthread.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <thread>

namespace larosa {
namespace {

volatile std::sig_atomic_t g_stop = 0;

void on_signal(int number) {
  if (g_stop) {
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
  g_stop = 1;
}

std::string clock_text(double seconds) {
  const int64_t s = std::llround(seconds);
  char text[32];
  if (s >= 3600) {
    std::snprintf(text, sizeof(text), "%d:%02d:%02d", static_cast<int>(s / 3600),
                  static_cast<int>(s / 60 % 60), static_cast<int>(s % 60));
  } else {
    std::snprintf(text, sizeof(text), "%d:%02d", static_cast<int>(s / 60), static_cast<int>(s % 60));
  }
  return text;
}

}  // namespace

void catch_interrupts() {
  static const bool once = [] {
    std::signal(SIGINT, on_signal);
    std::signal(SIGTERM, on_signal);
    std::thread([] {  // the thread that is always free to take them
      for (;;) pause();
    })
        .detach();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    return true;
  }();
  (void)once;
}
bool interrupted() {
  return g_stop != 0;
}
void throw_if_interrupted() {
  if (g_stop) throw Interrupted{};
}

Progress::Progress(std::string label, int64_t total, bool enabled)
    : label_(std::move(label)),
      total_(total < 1 ? 1 : total),
      enabled_(enabled),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      drawn_(start_ - std::chrono::seconds(1)) {}

Progress::~Progress() {
  finish();
}

void Progress::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

void Progress::update(int64_t done, const std::string& note) {
  if (!enabled_) return;
  const auto now = std::chrono::steady_clock::now();
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const double left = done > 0 ? elapsed * static_cast<double>(total_ - done) / static_cast<double>(done) : 0;
  if (terminal_) {
    if (done < total_ && now - drawn_ < std::chrono::milliseconds(100)) return;
    drawn_ = now;
    constexpr int kWidth = 30;
    const int filled = static_cast<int>(done * kWidth / total_);
    std::string bar(static_cast<size_t>(filled), '#');
    bar.resize(kWidth, '.');
    std::fprintf(stderr, "\r\033[K%s [%s] %3d %%  %s left  %s", label_.c_str(), bar.c_str(),
                 static_cast<int>(done * 100 / total_), clock_text(left).c_str(), note.c_str());
    open_ = true;
    if (done >= total_) finish();
  } else if (done * 10 / total_ != tenth_) {
    tenth_ = done * 10 / total_;
    std::fprintf(stderr, "%s: %d %%, %s left%s%s\n", label_.c_str(), static_cast<int>(done * 100 / total_),
                 clock_text(left).c_str(), note.empty() ? "" : ", ", note.c_str());
  }
  std::fflush(stderr);
}

}  // namespace larosa
