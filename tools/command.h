// The commands of the one binary. A command is a row of the table in main.cpp and a file of its own.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/thread_pool.h"

namespace larosa {

/// Declares a command's options on `app` and returns what runs it (exit code).
using Setup = std::function<int()> (*)(CLI::App& app);

std::function<int()> setup_sparsify(CLI::App& app);
std::function<int()> setup_run(CLI::App& app);
std::function<int()> setup_perplexity(CLI::App& app);
std::function<int()> setup_eval(CLI::App& app);
std::function<int()> setup_sweep(CLI::App& app);
std::function<int()> setup_inspect(CLI::App& app);
std::function<int()> setup_bench(CLI::App& app);
std::function<int()> setup_devices(CLI::App& app);
std::function<int()> setup_completion(CLI::App& app);

struct SparsifyOptions;
/// The options that a command line of sparsify asks for. Throws Error for what it would refuse.
SparsifyOptions parse_sparsify(std::vector<std::string> arguments);
/// True when they need a calibration text.
bool needs_text(const SparsifyOptions& options);
/// Windows of the calibration text, as sparsify takes them; wanted 0: its default. Sets the window's length.
std::vector<int32_t> calibration_tokens(const std::string& model, const std::string& calib, int64_t wanted,
                                        int64_t& window);

/// Flags that every command that computes shares: -t/--threads, --device, --backend, --products,
/// --no-progress.
struct MachineOptions {
  int threads = 0;               // 0: one per available core
  std::string device = "cpu";    // cpu, cuda or cuda:I
  std::string backend = "cpu";   // cpu or ref
  std::string products = "f32";  // f32 or bf16: arithmetic of dense products over many rows
  bool no_progress = false;
  /// With `sweep`, -t takes a list, which goes there.
  void declare(CLI::App& app, std::vector<int>* sweep = nullptr);
};

/// The machine that the options ask for. `pool` outlives the backend.
struct Machine {
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<Backend> backend;
};
Machine make_machine(const MachineOptions& options);

class Tokenizer;
struct PerplexityOptions;
/// Flags that say how a text is scored: --protocol, -c/--ctx-size, --stride, --chunks.
struct ScoringFlags {
  std::string protocol = "raw";
  int64_t context = 0, stride = 0, chunks = 0;  // 0: the protocol's; the window; all
  void declare(CLI::App& app);
  /// Checked against the context of the model (the lesser one of two). Throws Error naming the flag.
  PerplexityOptions options(const Tokenizer& tokenizer, int64_t most) const;
  /// The ids of a text under the protocol. Throws Error (file) when they are fewer than it needs.
  std::vector<int32_t> tokens(const Tokenizer& tokenizer, const std::string& text, const std::string& file,
                              int64_t window) const;
};

/// For printing: indented, paths that are not UTF-8 with U+FFFD.
std::string json_text(const nlohmann::ordered_json& json);

}  // namespace larosa
