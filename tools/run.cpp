// larosa run: continue a text, streaming.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "text/tokenizer.h"

namespace larosa {
namespace {

struct Flags {
  std::string model, prompt, file, kv = "f32";
  int64_t tokens = 128, context = 0;
  bool ignore_eos = false, sparse_prompt = false, check_tensors = false, echo = false;
  Sampling sampling;
  MachineOptions machine;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void write_out(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void print_timings(const Model& model, int64_t prompt, double prompt_seconds, int64_t steps, double seconds) {
  const TokenBytes bytes = token_bytes(model);
  const double per_token = static_cast<double>(bytes.sparse());
  std::fprintf(stderr, "\nprompt: %ld tokens, %.1f tokens/s\n", static_cast<long>(prompt),
               static_cast<double>(prompt) / prompt_seconds);
  if (steps == 0) return;
  const double rate = static_cast<double>(steps) / seconds;
  std::fprintf(stderr,
               "decode: %ld tokens, %.1f tokens/s, %.2f MB of weights per token (dense %.2f MB), %.2f GB/s\n",
               static_cast<long>(steps), rate, per_token / 1e6, static_cast<double>(bytes.dense()) / 1e6,
               per_token * rate / 1e9);
}

int run(const Flags& f) {
  validate(f.sampling);
  if (f.prompt.empty() == f.file.empty())
    fail("give a prompt with either -p TEXT or -f FILE (- for standard input)");
  const std::string prompt = f.file.empty() ? f.prompt : read_text(f.file);
  if (prompt.empty()) fail(f.file, ": the prompt is empty");
  const Model model = load_model(f.model);
  if (f.check_tensors) model.checkpoint->check_finite();
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  const auto ids = tokenizer.encode(prompt, true);
  const int64_t context =
      f.context > 0 ? f.context : std::min(model.config.context, static_cast<int64_t>(ids.size()) + f.tokens);
  if (static_cast<int64_t>(ids.size()) > model.config.context) {
    fail("the prompt has ", ids.size(), " tokens, the model's context is ", model.config.context);
  }
  Machine machine = make_machine(f.machine);
  std::fprintf(stderr, "%s\n", machine.backend->describe().c_str());
  Session session(model, *machine.backend, context, f.kv == "f16" ? DType::f16 : DType::f32);
  Sampler sampler(f.sampling);
  TextStream stream(tokenizer);
  catch_interrupts();
  auto start = std::chrono::steady_clock::now();
  session.feed(ids, !f.sparse_prompt);
  const double prompt_seconds = seconds_since(start);
  if (f.echo) write_out(prompt);
  start = std::chrono::steady_clock::now();
  int64_t steps = 0;
  for (int64_t n = 0; n < f.tokens && session.room() > 0 && !interrupted(); ++n) {
    const int32_t id = sampler.next(session.logits(), session.tokens());
    const auto& eos = model.config.eos;
    if (!f.ignore_eos && std::find(eos.begin(), eos.end(), id) != eos.end()) break;
    write_out(stream.push(id));
    if (n + 1 == f.tokens) break;
    session.feed(std::span(&id, 1), false);
    ++steps;
  }
  write_out(stream.finish() + "\n");
  print_timings(model, static_cast<int64_t>(ids.size()), prompt_seconds, steps, seconds_since(start));
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
  app.add_option("-c,--ctx-size", f->context,
                 "Room for tokens (default: as many as needed, at most the model's context)");
  app.add_option("--temp", f->sampling.temperature, "Temperature; 0: the most likely token")
      ->capture_default_str();
  app.add_option("--top-k", f->sampling.top_k, "Among the k most likely; 0: all")->capture_default_str();
  app.add_option("--top-p", f->sampling.top_p, "Among the most likely with this probability together")
      ->capture_default_str();
  app.add_option("--min-p", f->sampling.min_p,
                 "Only tokens of at least this share of the best one's probability")
      ->capture_default_str();
  app.add_option("--repeat-penalty", f->sampling.repeat_penalty, "Makes recent tokens less likely; 1: off")
      ->capture_default_str();
  app.add_option("--repeat-last-n", f->sampling.repeat_last_n, "Tokens that count as recent")
      ->capture_default_str();
  app.add_option("-s,--seed", f->sampling.seed, "Seed of the random draw")->capture_default_str();
  app.add_flag("--ignore-eos", f->ignore_eos, "Go on after the end of the text");
  app.add_flag("--sparse-prompt", f->sparse_prompt,
               "Thin the prompt as well (default: the prompt runs dense, it would not be faster)");
  app.add_flag("--echo", f->echo, "Print the prompt first");
  app.add_option("--kv", f->kv, "Type of the key/value cache")
      ->check(CLI::IsMember({"f32", "f16"}))
      ->capture_default_str();
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
  f->machine.declare(app);
  return [f] { return run(*f); };
}

}  // namespace larosa
