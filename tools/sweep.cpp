// larosa sweep: methods × sparsities × texts, as a table and a page.
#include "eval/sweep.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "base/error.h"
#include "base/progress.h"
#include "calib/methods.h"
#include "command.h"
#include "eval/report.h"
#include "io/files.h"
#include "model/config.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

struct Flags {
  std::string model, output, calib;
  ScoringFlags scoring;
  Strings methods, files;
  std::vector<double> sparsity = {0.25, 0.4, 0.5, 0.6, 0.7}, dense_prompt = {0};
  int64_t calib_tokens = 0, speed_tokens = 32;
  double ppl_share = 1;
  bool no_kl = false, no_speed = false, layers = false;
  MachineOptions machine;
};

/// Names for several flags of sparsify at once.
struct Preset {
  const char* name;
  const char* method;
  Strings flags;
};
const std::vector<Preset>& presets() {
  static const std::vector<Preset> table = {{"paper", "larosa", {"--preset=paper", "--form=simulate"}},
                                            {"paper-folded", "larosa", {"--preset=paper", "--form=folded"}}};
  return table;
}

/// Flags of sparsify that are not a method's: the sweep gives them itself, or has them as its own.
constexpr const char* kSweeps[] = {"model",        "output",        "method",  "sparsity", "calib",
                                   "calib-tokens", "check-tensors", "threads", "device",   "backend",
                                   "products",     "no-progress",   "help"};

std::string known_methods() {
  std::string known;
  for (const Method& m : methods())
    if (std::string(m.name) != "dense") known += (known.empty() ? "" : ", ") + std::string(m.name);
  for (const Preset& p : presets()) known += ", " + std::string(p.name);
  return known;
}

/// Commas separate methods and a method's options: what holds a "=" and no name before it, or begins like a
/// number, goes on with the method before it ("larosa:site-scale=0.8,1.2,0.8,1.2,pool=off,topk").
Strings split_methods(const Strings& pieces) {
  Strings names;
  for (const std::string& piece : pieces) {
    const size_t equals = piece.find('='), colon = piece.find(':');
    const bool option = equals != std::string::npos && colon > equals;
    const bool number =
        !piece.empty() && std::string_view("0123456789.-+").find(piece[0]) != std::string_view::npos;
    if (!names.empty() && (option || number)) {
      names.back() += "," + piece;
    } else {
      names.push_back(piece);
    }
  }
  return names;
}

/// "name" or "name:option=value,…" as a command line of sparsify, without the sparsity.
Strings method_arguments(const Flags& f, const std::string& name) {
  const size_t colon = name.find(':');
  const std::string base = name.substr(0, colon);
  Strings arguments = {f.model, "-o", "sweep", "--method", base};
  for (const Preset& preset : presets()) {
    if (base != preset.name) continue;
    arguments.back() = preset.method;
    arguments.insert(arguments.end(), preset.flags.begin(), preset.flags.end());
  }
  const auto all = methods();
  if (std::none_of(all.begin(), all.end(), [&](const Method& m) { return arguments[4] == m.name; }))
    fail("--methods ", base, ": unknown, expected one of: ", known_methods());
  bool value = false;  // a list goes on
  std::string rest = colon == std::string::npos ? "" : name.substr(colon + 1);
  while (!rest.empty()) {
    const size_t comma = rest.find(','), equals = rest.substr(0, comma).find('=');
    if (equals != std::string::npos && equals + 1 < std::min(comma, rest.size())) {
      const std::string option = rest.substr(0, equals), prefix = "--" + option + "=";
      if (std::find(std::begin(kSweeps), std::end(kSweeps), option) != std::end(kSweeps))
        fail("--methods ", name, ": ", option, " is not an option of a method");
      // The last one counts, so that a preset can be changed.
      std::erase_if(arguments, [&](const std::string& a) { return a.starts_with(prefix); });
      arguments.push_back("--" + rest.substr(0, comma));  // one word, as flags take a value
      value = true;
    } else if (value && equals == std::string::npos) {
      arguments.back() += "," + rest.substr(0, comma);
    } else {
      fail("--methods ", name, ": expected option=value behind the colon");
    }
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
  return arguments;
}

/// A method's options, checked at the least sparsity that it offers, or at 0 where it offers none of them:
/// what it refuses is a matter of the sweep, which makes rows with the reason of it.
SweepMethod parse_method(const Flags& f, const std::string& name, std::vector<double> sparsities) {
  sparsities.push_back(0);
  std::string reason;
  for (const double s : sparsities) {
    Strings arguments = method_arguments(f, name);
    arguments.push_back("--sparsity=" + std::to_string(s));
    try {
      return {name, parse_sparsify(arguments)};
    } catch (const Error& e) {
      reason = e.what();
      if (!reason.starts_with("--sparsity")) break;
    }
  }
  fail("--methods ", name, ": ", reason);
}

/// Every row of the table, and the paper's form.
Strings default_methods() {
  Strings names;
  for (const Method& m : methods())
    if (std::string(m.name) != "dense") names.push_back(m.name);
  names.push_back("paper");
  return names;
}

void read_texts(const Flags& f, SweepOptions& options) {
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  options.scoring = f.scoring.options(tokenizer, load_config(f.model).context);
  for (const std::string& file : f.files) {
    auto tokens = f.scoring.tokens(tokenizer, read_file(file), file, options.scoring.context);
    options.texts.push_back({fs::path(file).filename().string(), std::move(tokens)});
  }
}

void read_calibration(const Flags& f, SweepOptions& options) {
  for (const SweepMethod& m : options.methods) {
    if (!needs_text(m.options)) continue;
    if (f.calib.empty()) fail("--calib: method ", m.name, " needs a calibration text");
    options.calibration = calibration_tokens(f.model, f.calib, f.calib_tokens, options.calibration_window);
    options.calibration_name = fs::path(f.calib).filename().string();
    return;
  }
}

/// The command line again, from the options that were given.
std::string typed(const CLI::App& app, const std::string& model) {
  std::string text = "larosa sweep " + model;
  for (const CLI::Option* option : app.get_options()) {
    if (option->count() == 0 || option->get_positional()) continue;
    text += " " + option->get_name();
    if (option->get_expected_max() == 0) continue;
    std::string values;
    for (const std::string& value : option->results()) values += (values.empty() ? "" : ",") + value;
    text += " " + values;
  }
  return text;
}

void print_row(const ResultRow& row) {
  if (row.method == "dense") {
    std::printf("dense, %s, dense prompt %g: PPL = %.4f +/- %.4f\n", row.text.c_str(), row.dense_prompt,
                row.ppl, row.ppl_error);
  } else if (!row.refused.empty()) {
    std::printf("%s %g, %s: %s\n", row.method.c_str(), row.sparsity, row.text.c_str(), row.refused.c_str());
  } else {
    std::printf("%s %g, %s, dense prompt %g: PPL = %.4f +/- %.4f (%+.2f %%), reached %.4f",
                row.method.c_str(), row.sparsity, row.text.c_str(), row.dense_prompt, row.ppl, row.ppl_error,
                100 * (row.ppl / row.dense_ppl - 1), row.reached);
    if (std::isfinite(row.kl)) std::printf(", KL %.6f", row.kl);
    std::printf("\n");
  }
  std::fflush(stdout);
}

int run(const Flags& f, const CLI::App& app) {
  if (f.model.empty()) {
    if (f.output.empty()) fail("give a model to sweep over, or -o DIR of a sweep to make its report again");
    write_report(f.output);
    std::fprintf(stderr, "sweep: wrote %s/report.html\n", f.output.c_str());
    return 0;
  }
  if (f.files.empty()) fail("-f: expected a text to score");
  SweepOptions options;
  options.model = f.model;
  options.output = f.output.empty() ? model_name(f.model) + "-sweep" : f.output;
  options.sparsities = f.sparsity;
  std::sort(options.sparsities.begin(), options.sparsities.end());
  for (const std::string& m : f.methods.empty() ? default_methods() : split_methods(f.methods)) {
    if (m == "dense") fail("--methods: dense is always measured");
    options.methods.push_back(parse_method(f, m, options.sparsities));
  }
  options.dense_prompts = f.dense_prompt;
  options.protocol = f.scoring.protocol;
  options.kl = !f.no_kl;
  options.layers = f.layers;
  options.speed_tokens = f.no_speed ? 0 : f.speed_tokens;
  options.ppl_percent = f.ppl_share;
  options.progress = !f.machine.no_progress;
  options.command = typed(app, f.model);
  options.seen = print_row;
  read_texts(f, options);
  read_calibration(f, options);
  Machine machine = make_machine(f.machine);
  catch_interrupts();
  sweep(options, *machine.backend, *machine.pool);
  std::fprintf(stderr, "sweep: wrote %s/report.html\n", options.output.c_str());
  return 0;
}

}  // namespace

std::function<int()> setup_sweep(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  app.add_option("model,-m,--model", f->model, "Hugging Face directory (without it: the report of -o again)");
  app.add_option(
      "-o,--output", f->output,
      "Directory of the results (default: the model's name and -sweep); an interrupted sweep goes on there");
  app.add_option("--methods", f->methods,
                 "Methods by commas, with sparsify's options behind a colon: "
                 "larosa,topk,larosa:score=magnitude,pool=off. "
                 "Known: " +
                     known_methods() + " (default: all, and paper)")
      ->delimiter(',');
  app.add_option("--sparsity", f->sparsity, "Sparsities by commas")->delimiter(',')->capture_default_str();
  app.add_option("--calib", f->calib, "Calibration text");
  app.add_option("--calib-tokens", f->calib_tokens, "Tokens of it to use (default: as sparsify)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("-f,--file", f->files, "Texts to score, by commas")->delimiter(',');
  f->scoring.declare(app);
  app.add_option("--dense-prompt", f->dense_prompt,
                 "Modes by commas: share of each window that runs dense and is not scored")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--ppl-share", f->ppl_share,
                 "p of PPL-p %: the sparsity at which perplexity is p % above dense is measured (0: not)")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  app.add_flag("--no-kl", f->no_kl, "No KL divergence: half the time");
  app.add_flag("--layers", f->layers, "Also the divergence when one layer alone is thinned, on one window");
  app.add_flag("--no-speed", f->no_speed, "No timing");
  app.add_option("--speed-tokens", f->speed_tokens, "Tokens of each timing")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  f->machine.declare(app);
  return [f, &app] { return run(*f, app); };
}

}  // namespace larosa
