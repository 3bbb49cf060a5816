// Progress of long work on standard error, and the wish to stop it (Ctrl-C).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace larosa {

/// A bar with time left on a terminal, a plain line per tenth otherwise, nothing when disabled.
class Progress {
 public:
  Progress(std::string label, int64_t total, bool enabled);
  ~Progress();
  /// `done` of `total` units; `note` stands behind the bar.
  void update(int64_t done, const std::string& note = "");
  /// Ends the bar's line.
  void finish();

 private:
  std::string label_;
  int64_t total_;
  bool enabled_;
  bool terminal_;
  bool open_ = false;
  int64_t tenth_ = -1;
  std::chrono::steady_clock::time_point start_, drawn_;
};

/// Makes SIGINT and SIGTERM ask for a stop instead of ending the process; a second one ends it at once. The
/// calling thread and a pool's workers no longer take them, a thread of their own does: oneDNN 2.6's float32
/// products do not survive a signal handler on their stack (heap corrupted in 13 of 56 interrupted runs).
void catch_interrupts();
/// True once a stop was asked for.
bool interrupted();
/// Throws Interrupted when a stop was asked for.
void throw_if_interrupted();

/// Thrown by throw_if_interrupted: the command ends with exit code 130 after cleaning up.
struct Interrupted {};

}  // namespace larosa
