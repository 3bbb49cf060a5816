// larosa run: continue a text, streaming.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "engine/sampler.h"
#include "io/files.h"
#include "larosa/engine.h"

namespace larosa {
namespace {

struct Flags {
  std::string model;
  std::optional<std::string> prompt, file;
  int64_t tokens = 128;
  bool ignore_eos = false, check_tensors = false, echo = false;
  SessionOptions session;
  MachineOptions machine;
};

/// False when nobody can read on (a full disk): then there is no point in going on.
bool write_out(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  return std::fflush(stdout) == 0;
}

void print_timings(const Engine& engine, const Generated& g, const std::string& kv) {
  std::fprintf(stderr, "\nprompt: %ld tokens, %.1f tokens/s\n", static_cast<long>(g.prompt_tokens),
               static_cast<double>(g.prompt_tokens) / g.prompt_seconds);
  if (g.steps == 0) return;
  const TokenCost cost = engine.token_cost(g.prompt_tokens + g.steps / 2, kv);
  const double rate = static_cast<double>(g.steps) / g.decode_seconds;
  std::fprintf(stderr, "decode: %ld tokens, %.1f tokens/s, %.2f MB per token (dense %.2f MB), %.2f GB/s\n",
               static_cast<long>(g.steps), rate, static_cast<double>(cost.bytes) * 1e-6,
               static_cast<double>(cost.dense_bytes) * 1e-6, static_cast<double>(cost.bytes) * rate * 1e-9);
}

int run(Flags& f) {
  validate(f.session.sampling);
  if (f.prompt.has_value() == f.file.has_value())
    fail("give a prompt with either -p TEXT or -f FILE (- for standard input)");
  const std::string prompt = f.prompt ? *f.prompt : read_file(*f.file);
  if (prompt.empty()) fail(f.prompt ? "-p" : *f.file, ": the prompt is empty");
  const EngineOptions options{f.machine.threads, f.machine.backend, f.machine.products, f.check_tensors,
                              f.machine.device};
  const Engine engine(f.model, options);
  const auto ids = engine.encode(prompt);
  const int64_t size = static_cast<int64_t>(ids.size());
  if (size > engine.context())
    fail("the prompt has ", size, " tokens, the model's context is ", engine.context());
  if (f.session.context == 0) f.session.context = std::min(engine.context(), size + f.tokens);
  f.session.cancelled = interrupted;
  Session session(engine, f.session);
  std::fprintf(stderr, "%s\n", engine.describe().c_str());
  catch_interrupts();
  if (f.echo) write_out(prompt);
  const Generated generated = session.generate(ids, f.tokens, write_out, f.ignore_eos);
  write_out("\n");
  if (!generated.tokens.empty() || !interrupted()) print_timings(engine, generated, f.session.kv);
  throw_if_interrupted();
  return 0;
}

}  // namespace

std::function<int()> setup_run(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  app.add_option("model,-m,--model", f->model, "Model directory")->required();
  app.add_option("-p,--prompt", f->prompt, "Text to continue");
  app.add_option("-f,--file", f->file, "File with the text (- for standard input)");
  app.add_option("-n,--predict", f->tokens, "Tokens to make")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 31))
      ->capture_default_str();
  app.add_option("-c,--ctx-size", f->session.context,
                 "Room for tokens (default: as many as needed, at most the model's context)");
  app.add_option("--temp", f->session.sampling.temperature, "Temperature; 0: the most likely token")
      ->capture_default_str();
  app.add_option("--top-k", f->session.sampling.top_k, "Among the k most likely; 0: all")
      ->capture_default_str();
  app.add_option("--top-p", f->session.sampling.top_p, "Among the most likely with this probability together")
      ->capture_default_str();
  app.add_option("--min-p", f->session.sampling.min_p,
                 "Only tokens of at least this share of the best one's probability")
      ->capture_default_str();
  app.add_option("--repeat-penalty", f->session.sampling.repeat_penalty,
                 "Makes recent tokens less likely; 1: off")
      ->capture_default_str();
  app.add_option("--repeat-last-n", f->session.sampling.repeat_last_n, "Tokens that count as recent")
      ->capture_default_str();
  app.add_option("-s,--seed", f->session.sampling.seed, "Seed of the random draw")->capture_default_str();
  app.add_flag("--ignore-eos", f->ignore_eos, "Go on after the end of the text");
  app.add_flag("--sparse-prompt", f->session.sparse_prompt,
               "Thin the prompt as well (default: the prompt runs dense, it would not be faster)");
  app.add_flag("--echo", f->echo, "Print the prompt first");
  app.add_option("--kv", f->session.kv, "Type of the key/value cache")
      ->check(CLI::IsMember({"f32", "f16", "int8"}))
      ->capture_default_str();
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
  f->machine.declare(app);
  return [f] { return run(*f); };
}

}  // namespace larosa
