// larosa perplexity: the quality of a model on a text, alone or against another model.
#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "engine/engine_data.h"
#include "io/files.h"

namespace larosa {
namespace {

struct Flags {
  std::string model, file, against, kv = "f32";
  ScoringFlags scoring;
  double dense_prompt = 0;
  bool check_tensors = false, json = false;
  MachineOptions machine;
};

void print_text(const Flags& f, const PerplexityOptions& options, const PerplexityResult& r,
                const Backend& backend) {
  const Mean ppl = perplexity_of(r.nll);
  std::printf(
      "protocol %s, context %ld, %ld windows, %ld predictions, products %s, cache %s, dense prompt %g, %.0f "
      "tokens/s\n",
      f.scoring.protocol.c_str(), static_cast<long>(options.context), static_cast<long>(r.windows),
      static_cast<long>(r.predictions), backend.products_name().c_str(), f.kv.c_str(), options.dense_prompt,
      static_cast<double>(r.tokens) / r.seconds);
  if (!f.against.empty()) {
    const Mean reference = perplexity_of(r.reference_nll);
    std::printf("reference %s: PPL = %.4f +/- %.4f\n", f.against.c_str(), reference.value, reference.error);
    std::printf("delta PPL = %+.4f (%+.2f %%)\n", ppl.value - reference.value,
                100 * (ppl.value / reference.value - 1));
    std::printf("KL divergence = %.6f +/- %.6f\n", r.kl.value, r.kl.error);
    std::printf("same top token = %.2f %%\n", 100 * r.same_top);
  }
  if (r.reached) {
    std::printf("reached: %.2f %% of the weights dropped, of the entries", 100 * *r.reached);
    for (const Site site : kSites)
      std::printf(" %s %.2f %%", site_name(site), 100 * r.reached_sites[static_cast<size_t>(site)]);
    std::printf("\n");
  }
  std::printf("PPL = %.4f +/- %.4f\n", ppl.value, ppl.error);
}

void print_json(const Flags& f, const PerplexityOptions& options, const PerplexityResult& r,
                const Backend& backend) {
  const Mean ppl = perplexity_of(r.nll);
  nlohmann::ordered_json j = {{"model", f.model},
                              {"protocol", f.scoring.protocol},
                              {"context", options.context},
                              {"stride", options.stride > 0 ? options.stride : options.context},
                              {"windows", r.windows},
                              {"predictions", r.predictions},
                              {"products", backend.products_name()},
                              {"kv", f.kv},
                              {"dense_prompt", options.dense_prompt},
                              {"seconds", r.seconds},
                              {"ppl", ppl.value},
                              {"ppl_error", ppl.error},
                              {"nll", r.nll.value}};
  if (r.reached) {
    j["reached_weight_sparsity"] = *r.reached;
    for (const Site site : kSites)
      j["reached_sites"][site_name(site)] = r.reached_sites[static_cast<size_t>(site)];
  }
  if (!f.against.empty()) {
    j["against"] = f.against;
    j["reference_ppl"] = perplexity_of(r.reference_nll).value;
    j["kl"] = r.kl.value;
    j["kl_error"] = r.kl.error;
    j["same_top"] = r.same_top;
  }
  std::printf("%s\n", json_text(j).c_str());
}

int run(const Flags& f) {
  find_protocol(f.scoring.protocol);  // a wrong name is no reason to load a model
  Machine machine = make_machine(f.machine);
  Model model = load_model(f.model);
  std::optional<Model> reference;
  if (!f.against.empty()) reference = load_model(f.against);
  if (f.check_tensors) check_finite(model);
  if (f.check_tensors && reference) check_finite(*reference);
  const int64_t most = std::min(model.config.context, (reference ? *reference : model).config.context);
  if (!(f.dense_prompt >= 0 && f.dense_prompt < 1))
    fail("--dense-prompt ", f.dense_prompt, ": expected a number in [0, 1)");
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  PerplexityOptions options = f.scoring.options(tokenizer, most);
  options.dense_prompt = f.dense_prompt;
  options.kv = kv_dtype(f.kv);
  const std::string text = read_file(f.file);
  const auto tokens = f.scoring.tokens(tokenizer, text, f.file, options.context);
  if (reference && f.scoring.tokens(Tokenizer::load(f.against), text, f.file, options.context) != tokens)
    fail("--against ", f.against, ": its tokenizer cuts ", f.file, " into other tokens");
  place(model, *machine.backend);
  if (reference) place(*reference, *machine.backend);
  std::fprintf(stderr, "%s\n", machine.backend->describe().c_str());
  catch_interrupts();
  std::optional<Progress> progress;
  const auto result = perplexity(model, reference ? &*reference : nullptr, *machine.backend, *machine.pool,
                                 tokens, options, [&](const PerplexityResult& r, int64_t windows) {
                                   throw_if_interrupted();
                                   if (!progress)
                                     progress.emplace("perplexity", windows, !f.machine.no_progress);
                                   char note[64];
                                   std::snprintf(note, sizeof(note), "PPL %.4f", perplexity_of(r.nll).value);
                                   progress->update(r.windows, note);
                                 });
  if (!std::isfinite(result.nll.value))
    fail(f.model, ": the predictions are not finite (try --check-tensors)");
  (f.json ? print_json : print_text)(f, options, result, *machine.backend);
  return 0;
}

}  // namespace

std::function<int()> setup_perplexity(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  app.add_option("model,-m,--model", f->model, "Model directory")->required();
  app.add_option("-f,--file", f->file, "Text (- for standard input)")->required();
  f->scoring.declare(app);
  app.add_option("--dense-prompt", f->dense_prompt, "Share of each window that runs dense and is not scored")
      ->capture_default_str();
  app.add_option("--against", f->against, "Reference model: also KL divergence and equal top tokens");
  app.add_option("--kv", f->kv, "Type of the key/value cache (the reference's: f32)")
      ->check(CLI::IsMember({"f32", "f16", "int8"}))
      ->capture_default_str();
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
  app.add_flag("--json", f->json, "Result as JSON");
  f->machine.declare(app);
  return [f] { return run(*f); };
}

}  // namespace larosa
