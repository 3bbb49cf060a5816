// A grid of methods and sparsities on one model: every cell is sparsified, scored on every text, stored at
// once and deleted again. Interrupted sweeps go on where they stopped.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "calib/sparsify.h"
#include "eval/perplexity.h"
#include "eval/results.h"

namespace larosa {

/// A named set of sparsify's options; source, output and sparsity are the sweep's.
struct SweepMethod {
  std::string name;
  SparsifyOptions options;
};

struct SweepText {
  std::string name;
  std::vector<int32_t> tokens;
};

struct SweepOptions {
  std::string model;   // Hugging Face directory
  std::string output;  // directory of results.csv, sweep.json, report.html and plots/; made where absent
  std::vector<SweepMethod> methods;
  std::vector<double> sparsities;
  std::vector<SweepText> texts;
  std::vector<double> dense_prompts = {0};  // modes: PerplexityOptions::dense_prompt
  PerplexityOptions scoring;                // how texts become windows
  std::string protocol = "raw";             // for people
  std::vector<int32_t> calibration;         // whole windows, as sparsify takes them
  int64_t calibration_window = 1;
  std::string calibration_name;
  bool kl = true;             // score the dense model beside every cell, which doubles the time
  bool layers = false;        // the divergence when one layer alone is thinned, on the first text
  int64_t layer_windows = 1;  // windows of it
  int64_t speed_tokens = 32;  // tokens of each timing; 0: not timed
  double ppl_percent = 1;     // p of PPL-p %; 0: not searched
  std::string command;        // for people: what was typed
  bool progress = true;
  std::function<void(const ResultRow&)> seen;  // after every row; may be empty
};

/// The name of a model's directory, however the path is written ("models/demo-7m/", ".").
std::string model_name(const std::string& path);
/// Makes a directory and those above it where absent. Throws Error naming it when it cannot be one.
void make_directories(const std::string& path);

inline constexpr const char* kResultsFile = "results.csv";
inline constexpr const char* kLayersFile = "layers.csv";
inline constexpr const char* kSweepFile = "sweep.json";

/// Runs what is not measured yet and stores every row when it is. First the dense model, then the grid, then
/// points below the least measured sparsity for methods that lose ppl_percent before it: the interval that
/// holds the crossing is halved until it is at most 1/32 wide. What a method refuses ("--sparsity …" and
/// "--budget-includes-adapter: …" Errors) becomes a row with the reason. Throws Error for a directory begun
/// with other options, duplicate names, texts shorter than one window; Interrupted when asked to stop.
void sweep(const SweepOptions& options, Backend& backend, ThreadPool& pool);

}  // namespace larosa
