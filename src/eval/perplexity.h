// How well a model predicts a text, and how far it is from another model.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "eval/mean.h"
#include "model/model.h"
#include "text/tokenizer.h"

namespace larosa {

class ThreadPool;

/// How a text becomes windows and which predictions count. "Rows" are what Hugging Face's datasets makes of a
/// text file: every line with its line end, blank lines empty.
/// raw: the text as it is, no BOS, consecutive windows, every prediction.
/// larosa: every row followed by two line ends, what the tokenizer adds (a BOS) once, windows of 2048
/// (released LaRoSA evaluation script). hf: rows joined by two line ends, what the tokenizer adds once,
/// windows of 2048 or the given stride apart, the incomplete last one too; every token is scored once
/// (transformers' perplexity guide). llama.cpp: the text with BOS; windows of 512 start with BOS in place of
/// their first token where the tokenizer adds one; only the second half's predictions count; at least two
/// windows of text (llama-perplexity).
struct Protocol {
  const char* name;
  const char* row_end;   // what stands between (or behind) the rows; null: the text as it is
  bool ends_rows;        // also behind the last row
  bool leading_special;  // what the tokenizer adds stands once at the start
  bool window_bos;       // every window's first token becomes BOS where the tokenizer adds one
  double skipped_share;  // share of each window whose predictions do not count
  int64_t context;       // default window, at most the model's
  bool last_window;      // the incomplete last window is scored
  int64_t least_windows;
};
/// Throws Error listing the known names.
const Protocol& find_protocol(const std::string& name);
/// The ids of `text` under a protocol.
std::vector<int32_t> protocol_tokens(const Protocol& protocol, const Tokenizer& tokenizer,
                                     const std::string& text);

struct PerplexityOptions {
  int64_t context = 0;       // tokens per window
  int64_t stride = 0;        // tokens from window to window, at most context; 0: context
  bool last_window = false;  // Protocol::last_window
  double skipped_share = 0;  // Protocol::skipped_share
  int32_t bos = -1;          // replaces every window's first token when ≥ 0
  double dense_prompt = 0;   // share of each window that runs dense and is not scored
  int64_t most_windows = 0;  // 0: all
  DType kv = DType::f32;     // type of the model's key/value cache; the reference's is f32
};

struct PerplexityResult {
  int64_t windows = 0, predictions = 0;
  int64_t tokens = 0;   // run through the model, overlaps included
  Mean nll;             // of the model
  Mean reference_nll;   // of the reference
  Mean kl;              // Σ p_reference log(p_reference / p_model), nats
  double same_top = 0;  // share of predictions whose most likely token is the reference's
  double seconds = 0;
  /// Where the plan has thresholds, what was dropped: share of the projections' weights, of the sites'
  /// entries (the mean over layers and the projections that read them).
  std::optional<double> reached;
  std::array<double, 4> reached_sites{};
};

/// Scores `tokens` in windows, each token at most once; the first token of a window is never predicted.
/// `reference` may be null. Both are placed in the backend's memory (model.h, place).
/// `seen` is called after every window with the running result. Throws Error when the text is shorter than
/// one window.
PerplexityResult perplexity(const Model& model, const Model* reference, Backend& backend, ThreadPool& pool,
                            std::span<const int32_t> tokens, const PerplexityOptions& options,
                            const std::function<void(const PerplexityResult&, int64_t windows)>& seen);

}  // namespace larosa
