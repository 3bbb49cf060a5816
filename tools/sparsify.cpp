// larosa sparsify: calibrate, choose, fold, write.
#include "calib/sparsify.h"
#include "calib/planner.h"
#include "model/model.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "io/files.h"
#include "model/config.h"
#include "text/tokenizer.h"

namespace larosa {
namespace {

struct Flags {
  std::string model, output, method = "larosa", preset, calib, form = "folded", pool = "on", bases,
                             rotate = "on", rotate_h2 = "on", score = "norm", select = "normalised",
                             site_scale = "1,1,1,1", allocation, currency = "none", calib_stream = "thinned",
                             weights = "source", adapter_weights, head_weights, embed_weights, rounding;
  double sparsity = 0.5, mix = Choice{}.mix, shrink = Choice{}.shrink;
  int64_t calib_tokens = 0;
  std::optional<int64_t> basis_layers;
  std::optional<double> basis_weights;
  bool check_tensors = false, count_adapters = false;
  MachineOptions machine;
};

constexpr const char* kSearch = "search";  // --site-scale

std::array<double, 4> parse_scales(const std::string& text) {
  if (text == kSearch) return Choice{}.site_scale;
  std::array<double, 4> scales{};
  char end = 0;
  if (std::sscanf(text.c_str(), "%lf,%lf,%lf,%lf%c", &scales[0], &scales[1], &scales[2], &scales[3], &end) !=
      4) {
    fail("--site-scale ", text, ": expected four numbers a,b,c,d for h1 h2 h3 h4, or search");
  }
  return scales;
}

/// A preset fills in what was not given by a flag of its own.
void apply_preset(Flags& f, const CLI::App& app) {
  if (f.preset.empty()) return;
  const auto preset = [&](const char* option, std::string& value, const char* chosen) {
    if (app.get_option(option)->count() == 0) value = chosen;
  };
  preset("--form", f.form, "simulate");
  preset("--pool", f.pool, "off");
  preset("--rotate-h2", f.rotate_h2, "off");
  preset("--score", f.score, "magnitude");
  preset("--site-scale", f.site_scale, "0.8,1.2,0.8,1.2");
  preset("--select", f.select, f.form == "simulate" ? "gained" : "normalised");
}

/// What was asked for, else the method's own; presets are as published.
double basis_weights(const Flags& f, const CLI::App& app) {
  if (!f.basis_weights && app.get_option("--basis-weights")->count() > 0)
    fail("--basis-weights: is empty, expected a number");
  return f.basis_weights.value_or(f.preset.empty() ? find_method(f.method).basis_weights : 0);
}

/// What was asked for, else the method's own; site scales say by themselves how the budget is shared out.
Allocation allocation(const Flags& f, const CLI::App& app) {
  if (f.site_scale == kSearch) {
    if (!f.allocation.empty() && f.allocation != "uniform")
      fail("--site-scale search: --allocation ", f.allocation, " shares the budget out by itself");
    return Allocation::sites;
  }
  const auto* named = std::find(kAllocationNames.begin(), kAllocationNames.end(), f.allocation);
  if (named != kAllocationNames.end()) return static_cast<Allocation>(named - kAllocationNames.begin());
  const bool scaled = !f.preset.empty() || app.get_option("--site-scale")->count() > 0;
  return scaled ? Allocation::uniform : find_method(f.method).allocation;
}

/// --pool on|off is the older spelling of two of them.
Source basis_source(const Flags& f) {
  if (f.bases == "separate") return Source::separate;
  if (f.bases.empty()) return f.pool == "on" ? Source::pooled : Source::h1;
  return f.bases == "pooled" ? Source::pooled : Source::h1;
}

/// What was asked for, else a basis per layer, or one for all where adapters count: it needs none, and loses
/// less (docs/results.md, Ablation). Presets are as published; bases that change within layers save no
/// adapter.
int64_t basis_layers(const Flags& f, const Wants& wants) {
  if (f.basis_layers) return *f.basis_layers;
  const bool one = f.count_adapters && wants.moments && !wants.mlp && f.preset.empty();
  return one ? 0 : Choice{}.basis_layers;
}

std::vector<int32_t> calibration_tokens(const Flags& f, int64_t& window) {
  const ModelConfig config = load_config(f.model);
  window = std::min<int64_t>(config.context, 2048);
  const int64_t wanted = f.calib_tokens > 0 ? f.calib_tokens : 16 * window;
  window = std::min(window, wanted);
  if (f.calib.empty())
    fail("--calib: method ", f.method,
         ", --allocation, --site-scale search or --rounding gptq (the default for int4) needs a calibration "
         "text");
  const std::string text = read_file(f.calib);
  if (text.empty()) fail(f.calib, ": is empty");
  const std::vector<TokenId> ids = Tokenizer::load(f.model).encode(text, false);
  return calibration_windows(ids, window, (wanted + window - 1) / window, f.calib);
}

bool quantises(const StoredTypes& types) {
  return types.weights && quantised(*types.weights);
}

std::optional<DType> stored_type(const std::string& flag) {
  return flag == "source" ? std::nullopt : std::optional(dtype_of(flag));
}

/// What no flag chooses stands in int8 beside quantised weights, else as the source has it.
StoredTypes stored_types(const Flags& f) {
  StoredTypes types;
  types.weights = stored_type(f.weights);
  const auto chosen = [&](const std::string& flag) {
    if (!flag.empty()) return stored_type(flag);
    return quantises(types) ? std::optional(companion(*types.weights)) : std::nullopt;
  };
  types.adapters = chosen(f.adapter_weights);
  types.head = chosen(f.head_weights);
  types.embed = chosen(f.embed_weights);
  return types;
}

}  // namespace

bool needs_text(const SparsifyOptions& options) {
  const Method& method = find_method(options.method);
  return method.wants(options.choice).text() || plans_by_text(method, options.choice) || options.gptq;
}

namespace {

/// A flag that the method would not look at is a misunderstanding.
void refuse_unused(const Flags& f, const CLI::App& app, const SparsifyOptions& options, const Plan& plan) {
  const Choice& choice = options.choice;
  const Method& method = find_method(f.method);
  const auto refuse = [&](const char* option) {
    if (app.get_option(option)->count() > 0) fail(option, ": method ", f.method, " does not use it");
  };
  const Wants wants = method.wants(choice);
  if (!wants.moments) {
    for (const char* option :
         {"--pool", "--bases", "--basis-layers", "--basis-weights", "--rotate-h2", "--select", "--preset"})
      refuse(option);
  }
  refuse(wants.rotation ? "--score" : "--rotate");
  if (app.get_option("--bases")->count() > 0 && app.get_option("--pool")->count() > 0)
    fail("--pool: --bases says the same and more, give one of them");
  for (const char* option : {"--currency", "--shrink"}) {
    if (!by_curves(choice) && app.get_option(option)->count() > 0)
      fail(option, ": --allocation ", kAllocationNames[static_cast<size_t>(choice.allocation)],
           " does not use it");
  }
  if (wants.magnitudes) refuse("--score");
  if (!wants.mix) refuse("--mix");
  if (!wants.magnitudes) refuse("--calib-stream");
  if (!needs_text(options)) {
    refuse("--calib-tokens");
    if (app.get_option("--calib")->count() > 0)
      std::fprintf(stderr, "sparsify: method %s needs no calibration, --calib is not read\n",
                   f.method.c_str());
  }
  const bool scaled = app.get_option("--site-scale")->count() > 0;
  const bool uniform = choice.allocation == Allocation::uniform || choice.allocation == Allocation::sites;
  if (!uniform && (scaled || !f.preset.empty()))
    fail(scaled ? "--site-scale" : "--preset", ": --allocation ", f.allocation,
         " shares the budget out by itself");
  if (!quantises(options.types) && app.get_option("--rounding")->count() > 0)
    fail("--rounding: --weights ", f.weights, " are not quantised");
  if (!wants.stream || choice.form != Form::folded) {
    for (const char* option : {"--adapter-weights", "--budget-includes-adapter"}) {
      if (app.get_option(option)->count() > 0)
        fail(option, ": method ", f.method, " in this form has no adapters");
    }
  }
  const auto adapts = [](const LayerPlan& layer) { return layer.adapter || layer.middle; };
  if (app.get_option("--adapter-weights")->count() > 0 && std::ranges::none_of(plan.layers, adapts))
    fail("--adapter-weights: one basis for all layers has no adapters (--basis-layers 1: a basis per layer)");
  if (plan.layers[0] == trained_layer(load_config(f.model))) {
    for (const char* option : {"--sparsity", "--score", "--site-scale", "--allocation"}) refuse(option);
  }
}

/// What the flags ask for, checked against the model's shape.
SparsifyOptions read_options(Flags& f, const CLI::App& app) {
  apply_preset(f, app);
  if (f.output.empty()) fail("-o: is empty, expected a directory to write");
  SparsifyOptions options;
  options.source = f.model;
  options.output = f.output;
  options.method = f.method;
  Choice& choice = options.choice;
  choice.sparsity = f.sparsity;
  choice.site_scale = parse_scales(f.site_scale);
  choice.form = f.form == "folded" ? Form::folded : Form::simulate;
  choice.score = f.score == "norm" ? Score::norm : Score::magnitude;
  choice.source = basis_source(f);
  choice.basis_weights = basis_weights(f, app);
  choice.rotate = f.rotate == "on";
  choice.rotate_h2 = f.rotate_h2 == "on";
  choice.basis_layers = basis_layers(f, find_method(f.method).wants(choice));
  choice.allocation = allocation(f, app);
  choice.shrink = f.shrink;
  choice.currency = f.currency == "absolute"   ? Currency::absolute
                    : f.currency == "relative" ? Currency::relative
                    : f.currency == "update"   ? Currency::update
                                               : Currency::none;
  if (choice.allocation == Allocation::sites && choice.currency == Currency::none) {
    if (app.get_option("--currency")->count() > 0)
      fail("--currency none: --site-scale search adds up the errors of all layers, expected another one");
    choice.currency = Currency::relative;
  }
  choice.stream = f.calib_stream == "dense" ? Stream::dense : Stream::thinned;
  choice.mix = f.mix;
  choice.after_gain = f.select == "gained";
  if (choice.after_gain && choice.form == Form::folded)
    fail("--select gained: only --form simulate can thin after the RMSNorm gain");
  options.types = stored_types(f);
  options.gptq = quantises(options.types) &&
                 (f.rounding.empty() ? options.types.weights == DType::int4 : f.rounding == "gptq");
  options.check_tensors = f.check_tensors;
  options.count_adapters = f.count_adapters;
  options.progress = !f.machine.no_progress;
  refuse_unused(f, app, options, plan_model(find_method(f.method), load_config(f.model), choice));
  return options;
}

int run(Flags& f, const CLI::App& app) {
  SparsifyOptions options = read_options(f, app);
  int64_t window = 1;
  std::vector<int32_t> tokens;
  if (needs_text(options)) tokens = calibration_tokens(f, window);
  options.calibration_name = std::filesystem::path(f.calib).filename().string();
  Machine machine = make_machine(f.machine);
  catch_interrupts();
  sparsify(options, tokens, window, *machine.backend, *machine.pool);
  std::fprintf(stderr, "sparsify: wrote %s\n", options.output.c_str());
  return 0;
}

/// What is thinned, and how much of it.
void declare_budget(CLI::App& app, const std::shared_ptr<Flags>& f) {
  app.add_option("model,-m,--model", f->model, "Hugging Face directory")->required();
  app.add_option("-o,--output", f->output, "Directory to write")->required();
  app.add_option("--method", f->method, "larosa, topk, teal, wina, cats, rsparse or dense")
      ->capture_default_str();
  app.add_option("--preset", f->preset,
                 "paper: the published combination (simulate, thinned after the gain, basis from h1, .8/1.2)")
      ->check(CLI::IsMember({"paper"}));
  app.add_option("--sparsity", f->sparsity,
                 "Share of the projections' weight bytes that a token does not read, 0 to 0.95")
      ->capture_default_str();
  app.add_flag("--budget-includes-adapter", f->count_adapters,
               "Count the adapters' bytes as read: the projections drop so much more, or larosa has none "
               "(--basis-layers)");
  app.add_option(
         "--site-scale", f->site_scale,
         "Relative sparsity of h1,h2,h3,h4, or search: by the curves of --allocation lagrangian, added "
         "up over the layers")
      ->capture_default_str();
  app.add_option(
         "--allocation", f->allocation,
         "uniform: the same in every layer, by --site-scale; greedy: within each layer, by what it costs the "
         "layer's output; lagrangian: by curves of what each group alone costs its layer's output (default: "
         "lagrangian for larosa, uniform for other methods, with --preset and with --site-scale)")
      ->check(CLI::IsMember({"uniform", "greedy", "lagrangian"}));
  app.add_option(
         "--shrink", f->shrink,
         "lagrangian and --site-scale search only: how far their levels go back to the uniform ones, 0 "
         "to 1")
      ->capture_default_str();
  app.add_option(
         "--currency", f->currency,
         "lagrangian and --site-scale search only: errors relative to what a layer adds to the stream "
         "(update), to the layer's output (relative, the default of search), as they are in the stream "
         "(absolute); none: every layer meets the budget alone")
      ->check(CLI::IsMember({"update", "relative", "absolute", "none"}))
      ->capture_default_str();
  app.add_option(
         "--calib-stream", f->calib_stream,
         "teal, cats, rsparse: cuts are chosen for the stream that thinned layers pass on, or for the "
         "dense one (as published; drops more than asked for)")
      ->check(CLI::IsMember({"thinned", "dense"}))
      ->capture_default_str();
  app.add_option(
         "--mix", f->mix,
         "rsparse only: share of a projection's bytes that its channels get; the rest is a product of "
         "low rank")
      ->capture_default_str();
}

void declare_bases(CLI::App& app, const std::shared_ptr<Flags>& f) {
  const auto on_off = CLI::IsMember({"on", "off"});
  app.add_option("--calib", f->calib, "Calibration text (- for standard input)");
  app.add_option("--calib-tokens", f->calib_tokens,
                 "Tokens of it to use (default: 16 windows of the context, at most 2048 each)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option(
         "--form", f->form,
         "folded: rotations merged into the weights; simulate: applied at run time to the original weights")
      ->check(CLI::IsMember({"folded", "simulate"}))
      ->capture_default_str();
  app.add_option("--pool", f->pool, "Basis from h1 and h3 together, else from h1 alone")
      ->check(on_off)
      ->capture_default_str();
  app.add_option("--bases", f->bases,
                 "Basis from h1 and h3 pooled (as --pool on), from h1 (as --pool off), or separate ones of "
                 "attention and MLP with a change of basis in between")
      ->check(CLI::IsMember({"pooled", "h1", "separate"}));
  app.add_option("--basis-layers", f->basis_layers,
                 "Neighbouring layers that share a basis and need no adapter between them; 0: all (default: "
                 "1; 0 with "
                 "--budget-includes-adapter, but for --preset and --bases separate)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20));
  app.add_option(
      "--basis-weights", f->basis_weights,
      "Share of the weights that read it in the stream's basis, that of H + SHARE G: H second moments "
      "of the calibration text, G Gram matrices of the weights, of equal mean diagonals; 0: the text "
      "alone (default: 0.3; 0 with --preset paper)");
  app.add_option("--rotate", f->rotate, "wina only: in the bases that make k and gate orthogonal")
      ->check(on_off)
      ->capture_default_str();
  app.add_option("--rotate-h2", f->rotate_h2, "Attention output in a basis per KV head")
      ->check(on_off)
      ->capture_default_str();
  app.add_option("--score", f->score,
                 "Top-K compares |x| (magnitude) or |x| times the norm of the weights it meets (norm)")
      ->check(CLI::IsMember({"magnitude", "norm"}))
      ->capture_default_str();
  app.add_option(
         "--select", f->select,
         "simulate only: thin the normalised input before the RMSNorm gain, or the gained one after it")
      ->check(CLI::IsMember({"normalised", "gained"}))
      ->default_str("normalised");
}

void declare_types(CLI::App& app, const std::shared_ptr<Flags>& f) {
  const auto types = CLI::IsMember({"source", "f32", "f16", "bf16", "int8", "int4"});
  app.add_option("--weights", f->weights,
                 "Type of the projections' weights, products of low rank included; source: as they came")
      ->check(types)
      ->capture_default_str();
  app.add_option("--adapter-weights", f->adapter_weights,
                 "Type of the adapters (default: int8 with --weights int8 or int4, else source)")
      ->check(types);
  app.add_option("--head-weights", f->head_weights, "Type of the output head (default: as the adapters')")
      ->check(types);
  app.add_option("--embed-weights", f->embed_weights, "Type of the embedding (default: as the adapters')")
      ->check(types);
  app.add_option("--rounding", f->rounding,
                 "How weights are quantised: nearest, or gptq, by what they are multiplied with in the "
                 "calibration text (default: gptq for int4)")
      ->check(CLI::IsMember({"nearest", "gptq"}));
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
}

void declare(CLI::App& app, const std::shared_ptr<Flags>& f) {
  declare_budget(app, f);
  declare_bases(app, f);
  declare_types(app, f);
  f->machine.declare(app);
}

}  // namespace

std::function<int()> setup_sparsify(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  declare(app, f);
  return [f, &app] { return run(*f, app); };
}

SparsifyOptions parse_sparsify(std::vector<std::string> arguments) {
  auto f = std::make_shared<Flags>();
  CLI::App app;
  declare(app, f);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes them
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& e) {
    fail(e.what(), " (larosa sparsify --help)");
  }
  return read_options(*f, app);
}

std::vector<int32_t> calibration_tokens(const std::string& model, const std::string& calib, int64_t wanted,
                                        int64_t& window) {
  Flags f;
  f.model = model;
  f.calib = calib;
  f.calib_tokens = wanted;
  return calibration_tokens(f, window);
}

}  // namespace larosa
