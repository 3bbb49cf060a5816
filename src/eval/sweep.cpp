#include "eval/sweep.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/median.h"
#include "base/progress.h"
#include "eval/report.h"
#include "io/files.h"
#include "io/json.h"
#include "model/decoder.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr double kCrossingWidth = 1.0 / 32;  // of the interval that holds PPL-p %
constexpr int kSpeedRepeats = 3;
constexpr int64_t kSpeedPrompt = 16;

std::string hash_tokens(const std::vector<int32_t>& tokens) {
  return fingerprint_of({reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t)});
}

/// Invalid UTF-8 in names becomes U+FFFD.
std::string dump(const Json& json, int indent = -1) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g %%", 100 * share);
  return text;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[16];
  std::strftime(text, sizeof(text), "%Y-%m-%d", &utc);
  return text;
}

/// A text in a mode: what a row of one model is about.
struct Measure {
  size_t text, mode;
};

/// One sparsified model and what is to be measured on it.
struct Cell {
  const SweepMethod* method = nullptr;  // null: the dense model
  double sparsity = 0;
  bool extra = false;
  bool layers = false;
  std::vector<Measure> measures;

  bool empty() const { return measures.empty() && !layers; }
  std::string name() const { return method ? method->name : "dense"; }
  std::string label() const { return method ? name() + " " + percent(sparsity) : name(); }
};

/// True for what a method says of a sparsity that it does not offer.
bool is_refusal(const std::string& reason) {
  return reason.starts_with("--sparsity") || reason.starts_with("--budget-includes-adapter:");
}

void check(const SweepOptions& o) {
  const auto unique = [](const char* what, const std::string& name, std::set<std::string>& names) {
    if (!names.insert(name).second) fail(what, ": \"", name, "\" is given twice");
  };
  std::set<std::string> methods = {"dense"};  // its rows are always there
  std::set<std::string> texts, sparsities, modes;
  if (o.methods.empty() || o.sparsities.empty() || o.texts.empty() || o.dense_prompts.empty())
    fail("sweep: needs a method, a sparsity, a text and a mode at least");
  for (const SweepMethod& m : o.methods) unique("--methods", m.name, methods);
  for (const SweepText& t : o.texts) unique("--file", t.name, texts);
  for (const double s : o.sparsities) {
    if (!(s > 0 && s <= 0.95)) fail("--sparsity ", s, ": expected numbers in (0, 0.95]");
    unique("--sparsity", percent(s), sparsities);
  }
  for (const double p : o.dense_prompts) {
    if (!(p >= 0 && p < 1)) fail("--dense-prompt ", p, ": expected numbers in [0, 1)");
    unique("--dense-prompt", percent(p), modes);
  }
}

/// Of a sweep's directory. Raised when a method's name comes to mean something else: 2, larosa shares its
/// budget out by error curves; 3, adapters turn the skip path alone; 4, larosa has none where they count.
constexpr int kVersion = 4;

class Sweep {
 public:
  Sweep(const SweepOptions& options, Backend& backend, ThreadPool& pool)
      : options_(options), backend_(backend), pool_(pool), output_(options.output) {
    check(options);
    dense_ = load_model(options.model);
    if (is_larosa_dir(options.model))
      fail(options.model, ": config.json: field larosa: is the output of sparsify, not a source");
    std::sort(sparsities_.begin(), sparsities_.end());
  }

  void run() {
    open();
    place(dense_, backend_);
    progress_.emplace("sweep", grid_rows(), options_.progress);
    while (const auto cell = next()) {
      run_cell(*cell);
      write_report(output_.string());
    }
    for (const SweepMethod& method : options_.methods) fs::remove_all(kept_dir(method));
    progress_->update(grid_rows(), "done");
    progress_->finish();
    write_report(output_.string());
  }

 private:
  int64_t grid_rows() const {
    return static_cast<int64_t>((options_.methods.size() * sparsities_.size() + 1) * options_.texts.size() *
                                options_.dense_prompts.size());
  }

  // -- the directory -----------------------------------------------------------------------------------

  /// What must not change between the runs of one sweep.
  Json job() const {
    const SweepOptions& o = options_;
    Json methods = Json::array(), texts = Json::array();
    for (const SweepMethod& m : o.methods) methods.push_back(m.name);
    for (const SweepText& t : o.texts)
      texts.push_back({{"name", t.name}, {"tokens", t.tokens.size()}, {"hash", hash_tokens(t.tokens)}});
    const std::string config = read_file((fs::path(o.model) / "config.json").string());
    return {{"model", dense_.checkpoint->fingerprint()},
            {"config", fingerprint_of(config)},
            {"methods", methods},
            {"sparsity", sparsities_},
            {"texts", texts},
            {"dense_prompt", o.dense_prompts},
            {"protocol", o.protocol},
            {"context", o.scoring.context},
            {"stride", o.scoring.stride},
            {"chunks", o.scoring.most_windows},
            {"calibration",
             {{"name", o.calibration_name},
              {"tokens", o.calibration.size()},
              {"window", o.calibration_window},
              {"hash", hash_tokens(o.calibration)}}},
            {"kl", o.kl},
            {"layers", o.layers ? o.layer_windows : 0},
            {"speed_tokens", o.speed_tokens},
            {"ppl_percent", o.ppl_percent},
            {"products", backend_.products_name()}};
  }

  Json facts() const {
    const ModelConfig& c = dense_.config;
    return {{"name", model_name(options_.model)},
            {"architecture", c.architecture},
            {"parameters", parameter_count(c)},
            {"layers", c.layers},
            {"weights", dtype_name(dense_.layers[0].weights[Projection::wq].dtype)},
            {"machine", backend_.describe()},
            {"command", options_.command},
            {"date", today()}};
  }

  void open() {
    make_directories(output_.string());
    lock_.emplace(output_.string());
    const std::string state = (output_ / kSweepFile).string();
    const Json now = Json::parse(dump(job()));
    if (!fs::exists(state)) {
      if (!fs::is_empty(output_)) fail(output_.string(), ": is not empty and no sweep");
      write_file(state, dump({{"version", kVersion}, {"job", now}, {"facts", facts()}}, 1) + "\n");
      return;
    }
    const nlohmann::json file = read_json(state);
    const Fields fields(file, state);
    if (fields.get("version") != kVersion)
      fail(state, ": version is ", shown(fields.get("version")), ", expected ", kVersion,
           ": methods meant something else then; give another -o");
    const Fields then(fields.get("job"), state, "job.");
    for (const auto& [key, value] : now.items()) {
      const nlohmann::json& before = then.get(key);
      const nlohmann::json after = value;
      if (before != after)
        fail(output_.string(), ": was begun with other options (", key, " was ", shown(before), ", now ",
             shown(after), "); repeat them, or give another -o");
    }
    rows_ = stored(kResultsFile, results_from_csv);
    layer_rows_ = stored(kLayersFile, layers_from_csv);
    std::fprintf(stderr, "sweep: going on in %s with %zu rows measured\n", output_.c_str(), rows_.size());
  }

  template <class Read>
  auto stored(const char* name, Read read) const -> decltype(read("", "")) {
    const std::string path = (output_ / name).string();
    if (!fs::exists(path)) return {};
    return read(read_file(path), path);
  }

  // -- what is left to do ------------------------------------------------------------------------------

  const ResultRow* find(const std::string& method, double sparsity, const Measure& m) const {
    for (const ResultRow& row : rows_) {
      if (row.method == method && row.sparsity == sparsity && row.text == options_.texts[m.text].name &&
          row.dense_prompt == options_.dense_prompts[m.mode])
        return &row;
    }
    return nullptr;
  }

  std::vector<Measure> all_measures() const {
    std::vector<Measure> all;
    for (size_t t = 0; t < options_.texts.size(); ++t) {
      for (size_t m = 0; m < options_.dense_prompts.size(); ++m) all.push_back({t, m});
    }
    return all;
  }

  /// The cell with what is not measured of it.
  Cell missing(const SweepMethod* method, double sparsity) const {
    Cell cell{method, sparsity, false, false, {}};
    bool refused = false;
    for (const Measure& m : all_measures()) {
      const ResultRow* row = find(cell.name(), sparsity, m);
      if (!row) cell.measures.push_back(m);
      refused = refused || (row && !row->refused.empty());
    }
    cell.layers = options_.layers && method && !refused &&
                  std::none_of(layer_rows_.begin(), layer_rows_.end(), [&](const LayerRow& row) {
                    return row.method == method->name && row.sparsity == sparsity;
                  });
    return cell;
  }

  /// The next point of the search for PPL-p % on one text in one mode; nothing when it is done.
  std::optional<double> next_point(const SweepMethod& method, const Measure& m) const {
    std::vector<Point> points;
    double least = 1;  // of the grid's measured sparsities
    for (const ResultRow& row : rows_) {
      if (find(method.name, row.sparsity, m) != &row || !row.refused.empty()) continue;
      points.push_back({row.sparsity, row.ppl});
      if (!row.extra) least = std::min(least, row.sparsity);
    }
    if (points.empty()) return {};
    const Crossing c = ppl_crossing(points, find("dense", 0, m)->ppl, options_.ppl_percent / 100);
    if (!c.between || c.high > least || c.high - c.low <= kCrossingWidth) return {};
    const double middle = (c.low + c.high) / 2;
    if (find(method.name, middle, m)) return {};  // refused there
    return middle;
  }

  std::optional<Cell> next() const {
    if (const Cell cell = missing(nullptr, 0); !cell.empty()) return cell;
    for (const SweepMethod& method : options_.methods) {
      for (const double s : sparsities_) {
        if (const Cell cell = missing(&method, s); !cell.empty()) return cell;
      }
    }
    if (options_.ppl_percent <= 0) return {};
    for (const SweepMethod& method : options_.methods) {
      Cell cell{&method, 0, true, false, {}};
      for (const Measure& m : all_measures()) {
        const auto point = next_point(method, m);
        if (!point || (!cell.empty() && *point != cell.sparsity)) continue;
        cell.sparsity = *point;
        cell.measures.push_back(m);
      }
      if (!cell.empty()) return cell;
    }
    return {};
  }

  // -- doing it ----------------------------------------------------------------------------------------

  void note(const std::string& text) {
    const auto done = std::count_if(rows_.begin(), rows_.end(), [](const ResultRow& r) { return !r.extra; });
    progress_->update(done, text);
  }

  void add(const ResultRow& row) {
    rows_.push_back(row);
    std::stable_sort(rows_.begin(), rows_.end(), [&](const ResultRow& a, const ResultRow& b) {
      return std::pair(order(a.method), a.sparsity) < std::pair(order(b.method), b.sparsity);
    });
    write_file((output_ / kResultsFile).string(), results_to_csv(rows_));
    note(row.method);
    if (options_.seen) options_.seen(row);
  }

  size_t order(const std::string& method) const {
    for (size_t i = 0; i < options_.methods.size(); ++i)
      if (options_.methods[i].name == method) return i + 1;
    return 0;
  }

  /// What all rows of a cell say alike.
  ResultRow blank(const Cell& cell, const Measure& m) const {
    ResultRow row;
    row.method = cell.name();
    row.sparsity = cell.sparsity;
    row.extra = cell.extra;
    row.text = options_.texts[m.text].name;
    row.dense_prompt = options_.dense_prompts[m.mode];
    if (const ResultRow* dense = find("dense", 0, m)) row.dense_ppl = dense->ppl;
    return row;
  }

  /// Where a method's bases and error curves stand until the sweep is done, since no sparsity changes them.
  fs::path kept_dir(const SweepMethod& method) const {
    return output_ / ("kept-" + fingerprint_of(method.name));
  }

  void refuse(const Cell& cell, const std::string& reason) {
    for (const Measure& m : cell.measures) {
      ResultRow row = blank(cell, m);
      row.refused = reason;
      add(row);
    }
  }

  void run_cell(const Cell& cell) {
    if (!cell.method) return measure(cell, dense_, kMissing);
    const fs::path dir = output_ / ("model-" + fingerprint_of(dump(Json({cell.name(), cell.sparsity}))));
    double seconds = kMissing;
    if (!fs::exists(dir)) {
      note("sparsifying " + cell.label());
      SparsifyOptions o = cell.method->options;
      o.source = options_.model;
      o.output = dir.string();
      o.kept = kept_dir(*cell.method).string();
      o.choice.sparsity = cell.sparsity;
      o.calibration_name = options_.calibration_name;
      o.progress = false;
      const auto start = std::chrono::steady_clock::now();
      try {
        sparsify(o, options_.calibration, options_.calibration_window, backend_, pool_);
      } catch (const Error& e) {
        const std::string reason = e.what();
        if (!is_refusal(reason)) throw;
        fs::remove_all(dir.string() + ".partial");
        return refuse(cell, reason.substr(0, reason.find(" (what is finished stands in")));
      }
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    Model model = load_model(dir.string());
    place(model, backend_);
    measure(cell, model, seconds);
    if (cell.layers) measure_layers(cell, dir.string(), model);
    fs::remove_all(dir);
  }

  void measure(const Cell& cell, const Model& model, double sparsify_seconds) {
    double speed = kMissing, dense_speed = kMissing;
    const bool simulated = std::any_of(model.layers.begin(), model.layers.end(), [](const Layer& layer) {
      return std::any_of(layer.plan.groups.begin(), layer.plan.groups.end(),
                         [](const Group& group) { return group.rule.rotated; });
    });
    for (const ResultRow& row : rows_) {  // an earlier run's, of the same cell
      if (row.method != cell.name() || row.sparsity != cell.sparsity) continue;
      speed = row.speed, dense_speed = row.dense_speed, sparsify_seconds = row.sparsify_seconds;
    }
    for (const Measure& m : cell.measures) {
      if (std::isnan(speed) && options_.speed_tokens > 0 && !simulated && !cell.extra) {
        note("timing " + cell.label());
        std::tie(speed, dense_speed) = speeds(cell.method ? &model : nullptr);
      }
      ResultRow row = blank(cell, m);
      row.form = cell.method ? model.plan.form : "dense";
      row.speed = speed;
      row.dense_speed = dense_speed;
      row.sparsify_seconds = sparsify_seconds;
      score(cell, m, model, row);
      const TokenBytes bytes = token_bytes(model), whole = token_bytes(dense_);
      const auto planned = static_cast<double>(bytes.projections + bytes.low_rank);
      // Simulated bases stand beside wider weights, which nobody would deploy; what a threshold keeps stands
      // in no plan. What is reached counts low-rank products as read.
      const auto stored = static_cast<double>((simulated ? whole : bytes).projections_dense);
      const bool measured = simulated || varies(model.plan);
      row.weight_bytes = measured ? std::round((1 - row.reached) * stored) : planned;
      row.adapter_bytes = static_cast<double>(bytes.adapters);
      row.dense_bytes = static_cast<double>(whole.dense());
      if (!simulated) row.total_bytes = static_cast<double>(bytes.sparse()) - planned + row.weight_bytes;
      add(row);
    }
  }

  void score(const Cell& cell, const Measure& m, const Model& model, ResultRow& row) {
    PerplexityOptions scoring = options_.scoring;
    scoring.dense_prompt = options_.dense_prompts[m.mode];
    const bool compared = options_.kl && cell.method;
    const std::string label = cell.label() + ", " + options_.texts[m.text].name;
    const auto r = perplexity(
        model, compared ? &dense_ : nullptr, backend_, pool_, options_.texts[m.text].tokens, scoring,
        [&](const PerplexityResult& so_far, int64_t windows) {
          throw_if_interrupted();
          note(label + ", window " + std::to_string(so_far.windows) + "/" + std::to_string(windows));
        });
    row.seconds = r.seconds;
    row.windows = static_cast<double>(r.windows);
    row.predictions = static_cast<double>(r.predictions);
    const PlanShape shape = plan_shape(model.config);
    row.reached = r.reached ? *r.reached : weight_sparsity(model.plan, shape);
    for (const Site site : kSites) {
      const auto i = static_cast<size_t>(site);
      row.site[i] = r.reached ? r.reached_sites[i] : site_sparsity(model.plan, site, shape);
    }
    const Mean ppl = perplexity_of(r.nll);
    if (!std::isfinite(ppl.value) || !std::isfinite(ppl.error)) {
      if (!cell.method) fail(options_.model, ": the predictions are not finite");
      row.refused = "the predictions are not finite";
      return;
    }
    row.ppl = ppl.value;
    row.ppl_error = ppl.error;
    if (!cell.method) row.dense_ppl = row.ppl;
    if (!compared) return;
    row.kl = r.kl.value;
    row.kl_error = r.kl.error;
    row.same_top = r.same_top;
  }

  /// Divergence when layer l alone is thinned, from the same weights with every channel read: exact for any
  /// method and basis, where streams of two models could not be compared.
  void measure_layers(const Cell& cell, const std::string& dir, Model& model) {
    Model whole = load_model(dir);
    place(whole, backend_);
    for (Layer& layer : whole.layers) layer.plan = read_whole(layer.plan);
    PerplexityOptions scoring = options_.scoring;
    scoring.most_windows = options_.layer_windows;
    std::vector<LayerPlan> plans;
    for (Layer& layer : model.layers) plans.push_back(std::exchange(layer.plan, read_whole(layer.plan)));
    for (size_t l = 0; l < plans.size(); ++l) {
      note(cell.label() + ", layer " + std::to_string(l + 1) + "/" + std::to_string(plans.size()));
      std::swap(model.layers[l].plan, plans[l]);
      const auto r = perplexity(model, &whole, backend_, pool_, options_.texts[0].tokens, scoring,
                                [](const PerplexityResult&, int64_t) { throw_if_interrupted(); });
      std::swap(model.layers[l].plan, plans[l]);
      layer_rows_.push_back({cell.name(), cell.sparsity, static_cast<int64_t>(l), r.kl.value, r.kl.error});
    }
    write_file((output_ / kLayersFile).string(), layers_to_csv(layer_rows_));
  }

  static LayerPlan read_whole(LayerPlan plan) {
    for (Group& group : plan.groups) group.rule.select = Select::all;
    plan.neurons.select = Select::all;
    return plan;
  }

  // -- speed -------------------------------------------------------------------------------------------

  /// Tokens/s of decoding with `model` and with the dense one, in turn, medians. null: the dense one alone.
  std::pair<double, double> speeds(const Model* model) {
    std::vector<double> sparse, dense;
    for (int i = 0; i <= kSpeedRepeats; ++i) {  // the first touches every page and is not counted
      if (model) sparse.push_back(decode_seconds(*model));
      dense.push_back(decode_seconds(dense_));
    }
    const auto rate = [&](const std::vector<double>& seconds) {
      return static_cast<double>(options_.speed_tokens) / median({seconds.begin() + 1, seconds.end()});
    };
    const double speed = rate(dense);
    return {model ? rate(sparse) : speed, speed};
  }

  /// Decodes speed_tokens tokens of the first text behind a short prompt.
  double decode_seconds(const Model& model) {
    const ModelConfig& c = model.config;
    const std::vector<int32_t>& text = options_.texts[0].tokens;
    const int64_t prompt = std::min<int64_t>(kSpeedPrompt, static_cast<int64_t>(text.size()));
    const auto cache = backend_.make_kv_cache(
        {c.layers, c.kv_heads, c.head_dim, prompt + options_.speed_tokens, DType::f32});
    Decoder decoder(c, backend_, kSpeedPrompt);
    const auto hidden = backend_.allocate(kSpeedPrompt * c.dim * 4), logits = backend_.allocate(c.vocab * 4);
    const Mat rows(static_cast<float*>(hidden.get()), prompt, c.dim);
    decoder.forward(model, std::span(text).first(static_cast<size_t>(prompt)), *cache, 0, Pass{true, nullptr},
                    rows);
    backend_.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < options_.speed_tokens; ++i) {
      throw_if_interrupted();
      const auto at = static_cast<size_t>((prompt + i) % static_cast<int64_t>(text.size()));
      decoder.forward(model, std::span(text).subspan(at, 1), *cache, prompt + i, Pass{}, rows.slice(0, 1));
      decoder.logits(model, rows.slice(0, 1), Mat(static_cast<float*>(logits.get()), 1, c.vocab));
    }
    backend_.synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  const SweepOptions& options_;
  Backend& backend_;
  ThreadPool& pool_;
  fs::path output_;
  std::vector<double> sparsities_ = options_.sparsities;  // ascending
  Model dense_;
  std::optional<DirectoryLock> lock_;
  std::optional<Progress> progress_;
  std::vector<ResultRow> rows_;
  std::vector<LayerRow> layer_rows_;
};

}  // namespace

std::string model_name(const std::string& path) {
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

void make_directories(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) fail(path, ": expected a directory to write in: ", error.message());
}

void sweep(const SweepOptions& options, Backend& backend, ThreadPool& pool) {
  Sweep(options, backend, pool).run();
}

}  // namespace larosa
