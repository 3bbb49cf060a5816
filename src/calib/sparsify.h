// From a Hugging Face directory to a directory that runs sparse: calibrate, choose, fold, write. Streams
// layer by layer, resumes after an interruption, and leaves nothing half-made under the final name.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "backend/backend.h"
#include "calib/fold.h"
#include "calib/methods.h"

namespace larosa {

struct SparsifyOptions {
  std::string source;  // Hugging Face directory
  std::string output;  // directory to make; work in progress stands in "<output>.partial"
  std::string method = "larosa";
  Choice choice;
  bool count_adapters = false;  // choice.sparsity is what is saved with the adapters' bytes counted as read
  StoredTypes types;
  bool gptq = false;             // quantised projections are rounded by GPTQ (needs tokens), else to nearest
  std::string calibration_name;  // for the plan's notes
  // Directory for bases and error curves, which no sparsity changes: made where absent, read where a run with
  // equal options but the budget has left them, never removed. Empty: they go with the run.
  std::string kept;
  bool check_tensors = false;  // refuse NaN and infinities
  bool progress = true;
};

/// `tokens`: the calibration text's ids (empty for methods and roundings that need none), cut into windows of
/// `window` ids. Throws Error for an output that exists, a source that is refused, a partial directory made
/// with other options, text shorter than one window, a full disk; Interrupted when asked to stop (work done
/// so far is kept for a resume).
void sparsify(const SparsifyOptions& options, std::span<const int32_t> tokens, int64_t window,
              Backend& backend, ThreadPool& pool);

/// Windows for calibration, spread evenly over the text: `count` windows of `window` ids. Throws Error
/// (source) when the text is shorter than one window; takes fewer windows when it holds no more.
std::vector<int32_t> calibration_windows(std::span<const int32_t> text, int64_t window, int64_t count,
                                         const std::string& source);

}  // namespace larosa
