// larosa as a library: load a model, feed it a prompt, take tokens. Everything else under src/ is internal.
//
//   larosa::Engine engine("models/demo-7m");
//   larosa::Session session(engine);
//   session.generate(engine.encode("It was a dark night"), 64, [](std::string_view text) {
//     std::cout << text << std::flush;
//     return true;
//   });
//
// What the outside world can get wrong is thrown as larosa::Error. One thread at a time may use an engine and
// its sessions.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "larosa/error.h"

namespace larosa {

/// "0.1.0".
const char* version();

struct EngineOptions {
  int threads = 0;               // 0: one per available core
  std::string backend = "cpu";   // on the cpu: "cpu", or "ref": plain loops, the meaning of every operation
  std::string products = "f32";  // "f32" or "bf16": arithmetic of dense products over many rows (prompts)
  bool check_tensors = false;    // refuse weights with NaN or infinity
  std::string device = "cpu";    // "cpu", "cuda" or "cuda:I": the I-th NVIDIA device
};

/// What decoding one token reads from memory, bytes.
struct TokenCost {
  int64_t bytes = 0;        // kept channels, adapters, head, keys and values
  int64_t dense_bytes = 0;  // the same model with every channel and no adapter
};

/// A loaded model: a Hugging Face directory, or one that `larosa sparsify` wrote. Weights are mapped, not
/// copied (on a device of its own memory: copied there once).
class Engine {
 public:
  /// Throws Error for everything about the directory or the options that cannot be run.
  explicit Engine(const std::string& dir, const EngineOptions& options = {});
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  /// Token ids of UTF-8 text; add_special: with what the model's tokenizer puts around a text (a BOS for
  /// Llama).
  std::vector<int32_t> encode(std::string_view text, bool add_special = true) const;
  /// Text of ids; special tokens and ids that only pad the vocabulary are left out. Throws Error for ids
  /// outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

  /// Longest timeline the model was made for, tokens.
  int64_t context() const;
  int64_t vocab() const;
  /// True for tokens that end a text.
  bool ends_text(int32_t id) const;
  /// Cost of a token that sees `positions` earlier ones in a cache of SessionOptions::kv.
  TokenCost token_cost(int64_t positions = 0, const std::string& kv = "f32") const;
  /// One line on the machine: "cpu, 2 threads, AVX3, …".
  std::string describe() const;

  struct Data;

 private:
  friend class Session;
  std::unique_ptr<Data> data_;
};

/// How the next token is drawn: repeat penalty, top-k, top-p, min-p, temperature, draw, in this order.
struct Sampling {
  float temperature = 0.8f;  // 0: always the most likely token
  int top_k = 40;            // 0: all
  float top_p = 0.95f;       // 1: all
  float min_p = 0.05f;       // of the most likely one's probability; 0: all
  float repeat_penalty =
      1.0f;                // 1: none; the logit of a recent token is divided (multiplied when negative) by it
  int repeat_last_n = 64;  // how many tokens count as recent
  uint64_t seed = 0;
};

struct SessionOptions {
  int64_t context = 0;  // room for tokens, at most the model's; 0: the model's. Memory is taken as it fills
  std::string kv = "f32";      // type of the key/value cache: "f32", "f16" or "int8"
  bool sparse_prompt = false;  // thin the prompt's tokens as well (it would not be faster)
  Sampling sampling;
  /// Asked before every pass (up to 512 tokens of a prompt, or one token); true stops. May be empty.
  std::function<bool()> cancelled;
};

/// Why a generation ended.
enum class Stop { length, end_of_text, context_full, caller };

struct Generated {
  std::string text;
  std::vector<int32_t> tokens;
  Stop stop = Stop::length;
  int64_t prompt_tokens = 0;
  int64_t steps = 0;  // decoding passes, one fewer than tokens unless the text ended
  double prompt_seconds = 0, decode_seconds = 0;
};

/// One timeline of a model. The engine must outlive it (and stay where it is).
class Session {
 public:
  /// Throws Error for options out of range.
  explicit Session(const Engine& engine, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  /// Appends a prompt. Throws Error for an empty one, ids outside the vocabulary, or more than room(). When
  /// cancelled, the rest of the prompt is run by the next call that needs it.
  void feed(std::span<const int32_t> tokens);
  /// Draws the next token and appends it. Throws Error before the first feed and when the room is used up.
  int32_t next();
  /// Logits after the last token, until the next call of a member that appends. // (vocab)
  std::span<const float> logits();

  /// Feeds `prompt` and draws up to `count` tokens. `sink` is given the text as it becomes certain, always
  /// whole UTF-8 characters, and returns false to stop (it is not called again then); it may be empty. Stops
  /// at a token that ends the text unless `ignore_eos`.
  Generated generate(std::span<const int32_t> prompt, int64_t count,
                     const std::function<bool(std::string_view text)>& sink = {}, bool ignore_eos = false);

  /// All tokens so far, prompts included.
  std::span<const int32_t> tokens() const;
  /// How many more fit.
  int64_t room() const;

 private:
  struct Data;
  std::unique_ptr<Data> data_;
};

}  // namespace larosa
