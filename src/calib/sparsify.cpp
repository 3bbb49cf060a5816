#include "calib/sparsify.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "backend/algebra.h"
#include "base/error.h"
#include "base/progress.h"
#include "base/thread_pool.h"
#include "calib/findings.h"
#include "calib/fold.h"
#include "calib/gptq.h"
#include "calib/planner.h"
#include "calib/statistics.h"
#include "io/files.h"
#include "io/json.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

constexpr const char* kJobFile = "job.json";
constexpr const char* kFoldedFile = "folded.tmp";  // the layer that is being rounded, in float32
constexpr double kRoundingDamping = 0.01;          // of the mean moment, as GPTQ's
constexpr int64_t kCutTokens = 4096;               // of the calibration text that cuts are chosen on
// What people keep beside the weights; everything else of the source is not ours to copy.
constexpr const char* kCopied[] = {"tokenizer.json",    "tokenizer.model",        "vocab.json",
                                   "merges.txt",        "tokenizer_config.json",  "special_tokens_map.json",
                                   "added_tokens.json", "generation_config.json", "chat_template.jinja"};

void write_whole(SafetensorsWriter& writer, const FoldedTensor& t) {
  writer.write(t.name, 0, t.bytes.data(), static_cast<int64_t>(t.bytes.size()));
}

/// For people: "int8", or "source" where the source's types are kept.
std::string type_name(const std::optional<DType>& dtype) {
  return dtype ? dtype_name(*dtype) : "source";
}

nlohmann::json options_json(const SparsifyOptions& options) {
  const Choice& choice = options.choice;
  return {{"method", options.method},
          {"sparsity", choice.sparsity},
          {"count_adapters", options.count_adapters},
          {"site_scale", choice.site_scale},
          {"form", static_cast<int>(choice.form)},
          {"score", static_cast<int>(choice.score)},
          {"source", static_cast<int>(choice.source)},
          {"basis_layers", choice.basis_layers},
          {"rotate", choice.rotate},
          {"rotate_h2", choice.rotate_h2},
          {"mix", choice.mix},
          {"after_gain", choice.after_gain},
          {"allocation", static_cast<int>(choice.allocation)},
          {"stream", static_cast<int>(choice.stream)},
          {"currency", static_cast<int>(choice.currency)},
          {"shrink", choice.shrink},
          {"weights", type_name(options.types.weights)},
          {"adapters", type_name(options.types.adapters)},
          {"head", type_name(options.types.head)},
          {"embedding", type_name(options.types.embed)},
          {"gptq", options.gptq}};
}

class Job {
 public:
  Job(const SparsifyOptions& options, std::span<const int32_t> tokens, int64_t window, Backend& backend,
      ThreadPool& pool)
      : options_(options),
        tokens_(tokens),
        window_(window),
        backend_(backend),
        algebra_(backend.make_algebra(pool)),
        pool_(pool),
        config_(load_config(options.source)),
        checkpoint_(Checkpoint::open(options.source)),
        method_(find_method(options.method)),
        choice_(options.choice),
        wants_(method_.wants(choice_)),
        by_text_(plans_by_text(method_, choice_)),
        gptq_(options.gptq && options.types.weights && quantised(*options.types.weights)),
        output_(vacant_path(options.output)),
        partial_(output_ + ".partial"),
        findings_(partial_, options.kept.empty() ? partial_ : options.kept) {}

  void run() {
    try {
      prepare();
      work();
    } catch (const Error& e) {
      if (!abandon()) throw;
      fail(e.what(), " (what is finished stands in ", partial_, "; the same command resumes)");
    } catch (...) {
      abandon();
      throw;
    }
  }

 private:
  void work() {
    // An eigenbasis and a folded layer each cost about as much as a few windows; rounding by moments walks
    // the windows twice more.
    const int64_t walks = (wants_.moments ? 1 : 0) + (gptq_ ? 2 : 0);
    const bool weighed = wants_.bases() && !wants_.moments;  // bases of weights alone
    const int64_t layer_units =
        walks * windows() + (weighed ? kFoldUnits : 0) + (by_text_ ? kPlanUnits : 0) + kFoldUnits;
    progress_.emplace("sparsify", config_.layers * layer_units + kFoldUnits, options_.progress);
    if (wants_.moments) calibrate();
    if (weighed) weigh();
    if (by_text_) plan_layers();
    write_outer();
    if (gptq_) {
      round_layers();
    } else {
      for (int64_t l = 0; l < config_.layers; ++l) write_layer(l);
    }
    complete();
  }

  bool needs_tokens() const { return wants_.text() || by_text_ || gptq_; }
  int64_t windows() const { return needs_tokens() ? static_cast<int64_t>(tokens_.size()) / window_ : 0; }

  /// After a failure: removes the partial directory unless something in it is worth a resume. True if it
  /// stays.
  bool abandon() const {
    if (!owned_) return false;
    std::error_code ignored;
    if (findings_.any()) return true;
    for (const auto& entry : fs::directory_iterator(partial_, ignored))
      if (entry.path().extension() == ".safetensors") return true;
    fs::remove_all(partial_, ignored);
    return false;
  }

  static constexpr int64_t kFoldUnits = 4, kPlanUnits = 16;

  void tick(int64_t units, const std::string& note) {
    throw_if_interrupted();
    progress_->update(done_ += units, note);
  }

  /// Checks everything that can be checked before the first byte is written; makes or re-opens the partial
  /// directory.
  void prepare() {
    if (is_larosa_dir(options_.source))
      fail(options_.source, ": config.json: field larosa: is the output of sparsify, not a source");
    if (options_.check_tensors) checkpoint_.check_finite();
    if (needs_tokens() && static_cast<int64_t>(tokens_.size()) < window_)
      fail("calibration: ", tokens_.size(), " tokens, at least ", window_, " are needed");
    for (int32_t id : tokens_) {
      if (id < 0 || id >= config_.vocab)
        fail("calibration: token id ", id, " is outside the model's vocabulary of ", config_.vocab);
    }
    load_outer(checkpoint_, config_);
    for (int64_t l = 0; l < config_.layers; ++l) load_layer(checkpoint_, config_, l);
    outline_plan();
    prepare_kept();
    const std::string job = job_text(true);
    const std::string file = (fs::path(partial_) / kJobFile).string();
    fs::create_directory(partial_);
    lock_.emplace(partial_);
    vacant_path(output_);  // another process may have completed it meanwhile
    if (fs::exists(file) || !fs::is_empty(partial_)) {
      if (!fs::exists(file) || read_file(file) != job)
        fail(
            partial_,
            ": was begun with other options, text or model, or by another version; remove it to start again");
      owned_ = true;
      std::fprintf(stderr, "sparsify: resuming from %s\n", partial_.c_str());
      return;
    }
    owned_ = true;
    write_file(file, job);
  }

  /// Opens or begins the directory of what the next sparsity can use.
  void prepare_kept() const {
    if (options_.kept.empty()) return;
    const std::string file = (fs::path(options_.kept) / kJobFile).string();
    const std::string job = job_text(false);
    fs::create_directory(options_.kept);
    if (!fs::exists(file) && fs::is_empty(options_.kept)) return write_file(file, job);
    if (!fs::exists(file) || read_file(file) != job)
      fail(options_.kept,
           ": was begun with other options, text or model, or by another version; remove it to start again");
  }

  /// The plan before anything was measured: layers at uniform levels, everything else as it will be.
  void outline_plan() {
    const Choice& choice = choice_;
    plan_ = plan_model(method_, config_, choice);
    if (options_.count_adapters) {
      choice_.sparsity += adapter_share();
      if (choice_.sparsity > kMostSparse)
        fail("--budget-includes-adapter: the projections would have to drop ", choice_.sparsity, ", at most ",
             kMostSparse, " is possible");
      plan_ = plan_model(method_, config_, choice);
      plan_.sparsity = options_.choice.sparsity;
      plan_.notes["budget"] = "with adapters";
    }
    plan_.fingerprint = checkpoint_.fingerprint();
    const StoredTypes& types = options_.types;
    refuse_quantised_words();
    plan_.notes["weights"] = type_name(types.weights);
    const auto adapts = [](const LayerPlan& layer) { return layer.adapter || layer.middle; };
    if (std::any_of(plan_.layers.begin(), plan_.layers.end(), adapts))
      plan_.notes["adapters"] = type_name(types.adapters);
    plan_.notes["head"] = type_name(types.head);
    plan_.notes["embedding"] = type_name(types.embed);
    if (wants_.bases() && !wants_.moments) plan_.notes["bases"] = "of weights";
    if (wants_.moments) {
      plan_.notes["pool"] = choice.source == Source::pooled ? "on" : "off";
      if (wants_.mlp) plan_.notes["bases"] = "separate";
      if (choice.basis_layers != 1) plan_.notes["basis_layers"] = std::to_string(choice.basis_layers);
      plan_.notes["rotate_h2"] = choice.rotate_h2 ? "on" : "off";
      plan_.notes["gain"] = choice.after_gain ? "before selection" : "after selection";
    }
    if (wants_.magnitudes) plan_.notes["stream"] = choice.stream == Stream::thinned ? "thinned" : "dense";
    if (types.weights && quantised(*types.weights)) plan_.notes["rounding"] = gptq_ ? "gptq" : "nearest";
    if (needs_tokens()) {
      plan_.notes["calibration"] = options_.calibration_name;
      plan_.notes["calibration_tokens"] = std::to_string(tokens_.size());
      plan_.notes["calibration_window"] = std::to_string(window_);
    }
    validate(plan_, plan_shape(config_), options_.source);
  }

  /// Bytes of the outline's adapters over those of all projections.
  double adapter_share() const {
    const LayerWeights weights = load_layer(checkpoint_, config_, 0);
    const StoredTypes& types = options_.types;
    const DType adapter = types.adapters.value_or(weights[Projection::wo].dtype);
    int64_t one = config_.dim * line_bytes(adapter, config_.dim);
    if (quantised(adapter)) one += std::min(kAdapterTop, config_.dim) * config_.dim * dtype_size(DType::f32);
    int64_t adapters = 0, projections = 0;
    for (const LayerPlan& layer : plan_.layers) {
      adapters += (layer.middle ? one : 0) + (layer.adapter ? one : 0);
      for (const Projection p : kProjections)
        projections += projection_in(config_, p) *
                       line_bytes(types.weights.value_or(weights[p].dtype), projection_out(config_, p));
    }
    return static_cast<double>(adapters) / static_cast<double>(projections);
  }

  /// Quantised lines run along the outputs of an input, in blocks of 128: no output can be left out, and
  /// those of a low rank would be mostly padding.
  void refuse_quantised_words() const {
    const std::optional<DType>& weights = options_.types.weights;
    const LayerPlan& layer = plan_.layers[0];
    if (!weights || !quantised(*weights) || layer == trained_layer(config_)) return;
    const auto has_rank = [](const Group& group) { return group.rank > 0; };
    const bool ranks = std::ranges::any_of(layer.groups, has_rank);
    if (layer.neurons.select == Select::all && !ranks) return;
    fail("--weights ", dtype_name(*weights), ": method ", method_.name,
         ranks ? " has products of low rank" : " reads up by outputs", ", expected f32, f16 or bf16");
  }

  /// Everything that decides a byte of the output: what was asked for, not what calibration makes of it.
  /// Without the budget: everything that decides the bases and curves.
  std::string job_text(bool budget) const {
    const std::string_view text(reinterpret_cast<const char*>(tokens_.data()), tokens_.size_bytes());
    // The fingerprint names the tensors; a base frequency or a norm's epsilon stands in the config alone.
    const std::string config = read_file((fs::path(options_.source) / "config.json").string());
    nlohmann::json options = options_json(options_), notes = plan_.notes;
    if (!budget) {
      for (const char* field : {"sparsity", "count_adapters"}) options.erase(field);
      notes.clear();  // a note can hang on the budget: rsparse's mix is named where ranks are left
    }
    return nlohmann::json({{"version", kPlanVersion},
                           {"options", options},
                           {"notes", notes},
                           {"fingerprint", plan_.fingerprint},
                           {"text", fingerprint_of(text)},
                           {"window", window_},
                           {"config", fingerprint_of(config)},
                           {"products", backend_.products_name()}})
        .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  }

  std::string shard_name(int64_t index) const {
    char name[64];
    std::snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors", static_cast<int>(index + 1),
                  static_cast<int>(config_.layers + 1));
    return name;
  }

  /// The dense model's moments, layer after layer, and the bases of layers that share them at the last one's.
  void calibrate() {
    const Choice& choice = choice_;
    int64_t finished = 0;
    while (finished < config_.layers && findings_.has_bases(finished)) ++finished;
    if (finished == config_.layers) return tick(config_.layers * windows(), "calibration found");
    while (finished > 0 && !ends_basis(config_, choice, finished - 1)) --finished;
    Calibration calibration(load_outer(checkpoint_, config_), config_, backend_, *algebra_, tokens_, window_);
    std::vector<Moments> group;  // of the layers since the last basis ended
    for (int64_t l = 0; l < config_.layers; ++l) {
      // Layers whose basis is stored only carry the text on to the next one.
      const Wants wants = l < finished ? Wants{} : wants_;
      const std::string note = layer_note("calibrating", l);
      Layer layer;
      layer.weights = load_layer(checkpoint_, config_, l);
      layer.groups.resize(layer.plan.groups.size());
      const auto memory = place(layer, config_, backend_);
      group.push_back(calibration.moments(layer, l, wants, choice, [&] { tick(1, note); }));
      release_layer(l);
      if (!ends_basis(config_, choice, l)) continue;
      if (l >= finished) write_group(l, group);
      group.clear();
    }
  }

  /// Bases of the layers up to `last`, which share the stream's moments.
  void write_group(int64_t last, std::vector<Moments>& group) {
    const auto add = [](Matrix& sum, const Matrix& m) {
      for (size_t i = 0; i < m.data.size(); ++i) sum.data[i] += m.data[i];
    };
    for (size_t i = 1; i < group.size(); ++i) {
      add(group[0].h1, group[i].h1);
      add(group[0].h3, group[i].h3);
    }
    const int64_t first = last + 1 - static_cast<int64_t>(group.size());
    Bases shared;
    for (int64_t l = first; l <= last; ++l) {
      std::swap(group[0].heads, group[static_cast<size_t>(l - first)].heads);
      const LayerWeights weights = load_layer(checkpoint_, config_, l);
      Bases bases = method_.bases({config_, choice_, weights, group[0], *algebra_});
      if (l == first) {
        shared.stream = bases.stream;
        shared.mlp = bases.mlp;
        group[0].h1 = group[0].h3 = Matrix();
      }
      bases.stream = shared.stream;
      bases.mlp = shared.mlp;
      findings_.write_bases(l, bases);
    }
  }

  /// Bases that come from the weights alone.
  void weigh() {
    for (int64_t l = 0; l < config_.layers; ++l) {
      const LayerWeights weights = load_layer(checkpoint_, config_, l);
      if (!findings_.has_bases(l))
        findings_.write_bases(l, method_.bases({config_, choice_, weights, Moments{}, *algebra_}));
      tick(kFoldUnits, layer_note("basis of", l));
    }
  }

  /// The windows that plans are found on, and their length: whole ones for cuts, else what a trial looks at.
  std::vector<int32_t> planning_tokens(int64_t& window) const {
    window = wants_.magnitudes ? window_ : std::min(window_, Trial::kWindow);
    const int64_t wanted = wants_.magnitudes ? std::max<int64_t>(1, kCutTokens / window) : Trial::kWindows;
    const int64_t count = std::min(wanted, windows());
    std::vector<int32_t> tokens;
    for (int64_t w = 0; w < count; ++w) {
      const auto first = tokens_.begin() + w * (windows() / count) * window_;
      tokens.insert(tokens.end(), first, first + window);
    }
    return tokens;
  }

  /// Layers one after another, each folded in float32: its plan or curves, and the text on to the next one.
  void plan_layers() {
    int64_t finished = 0;
    while (finished < config_.layers &&
           (lagrangian() ? findings_.has_curves(finished) : findings_.has_plan(finished)))
      ++finished;
    int64_t window = 0;
    const std::vector<int32_t> tokens = planning_tokens(window);
    Calibration calibration(load_outer(checkpoint_, config_), config_, backend_, *algebra_, tokens, window);
    const Bases first = choice_.form == Form::folded ? findings_.read_bases(0, config_, wants_) : Bases{};
    if (!first.stream.empty()) calibration.turn(first.stream);
    std::vector<Curve> curves;
    for (int64_t l = 0; l < config_.layers; ++l) {
      if (finished < config_.layers) plan_next_layer(calibration, l, l < finished);
      if (lagrangian()) {
        const std::vector<Curve> found =
            findings_.read_curves(l, config_, plan_.layers[static_cast<size_t>(l)]);
        curves.insert(curves.end(), found.begin(), found.end());
      } else {
        plan_.layers[static_cast<size_t>(l)] = plan_from(l);
      }
      tick(kPlanUnits, layer_note("planning", l));
    }
    if (lagrangian()) share_out(curves);
    validate(plan_, plan_shape(config_), partial_);
  }

  bool lagrangian() const { return choice_.allocation == Allocation::lagrangian; }

  LayerTask task_of(int64_t l) const {
    const Choice& choice = choice_;
    return {config_, choice, l, uniform_levels(config_, choice.sparsity, choice.site_scale)};
  }

  void plan_next_layer(Calibration& calibration, int64_t l, bool found) {
    const fs::path folded = fs::path(partial_) / kFoldedFile;
    StoredTypes types = options_.types;
    types.weights = types.adapters = DType::f32;
    fold_to(folded, l, types);
    const Checkpoint file = Checkpoint::open_file(folded.string());
    Layer layer = load_stored_layer(file, config_, plan_.layers[static_cast<size_t>(l)], l);
    const auto memory = place(layer, config_, backend_);
    if (!found && lagrangian()) {
      findings_.write_curves(l, find_curves(method_, task_of(l), layer, calibration));
    } else if (!found) {
      findings_.write_plan(l, find_plan(method_, task_of(l), layer, calibration));
    }
    if (!lagrangian()) layer.plan = plan_from(l);
    const bool thinned = wants_.magnitudes && choice_.stream == Stream::thinned;
    if (l + 1 < config_.layers) calibration.walk(layer, l, Pass{!thinned, nullptr}, throw_if_interrupted);
    fs::remove(folded);
  }

  LayerPlan plan_from(int64_t l) const {
    const auto at = static_cast<size_t>(l);
    Plan whole = plan_;
    whole.layers[at] = findings_.read_plan(l, plan_.layers[at]);
    validate(whole, plan_shape(config_), partial_);
    return whole.layers[at];
  }

  /// The layers' plans from the curves of all of them.
  void share_out(const std::vector<Curve>& curves) {
    const double sparsity = choice_.sparsity;
    std::vector<double> levels;
    if (choice_.currency == Currency::none) {
      const size_t groups = plan_.layers[0].groups.size();
      for (auto first = curves.begin(); first != curves.end(); first += static_cast<ptrdiff_t>(groups)) {
        const std::vector<Curve> own(first, first + static_cast<ptrdiff_t>(groups));
        for (const double own_level : lagrangian_levels(own, sparsity)) levels.push_back(own_level);
      }
    } else {
      levels = lagrangian_levels(curves, sparsity);
    }
    auto level = levels.begin();
    for (int64_t l = 0; l < config_.layers; ++l) {
      LayerTask task = task_of(l);
      LayerPlan& plan = plan_.layers[static_cast<size_t>(l)];
      for (const Group& group : plan.groups) {
        const double uniform = task.levels[static_cast<size_t>(group.projections[0])];
        set_level(task.levels, group, std::lerp(*level++, uniform, choice_.shrink));
      }
      plan = plan_layer(method_, task);
    }
  }

  std::map<std::string, std::string> shard_metadata() const {
    return {{"format", "larosa"}, {"larosa.fingerprint", plan_.fingerprint}};
  }

  std::string layer_note(const char* doing, int64_t l) const {
    return doing + (" layer " + std::to_string(l + 1)) + "/" + std::to_string(config_.layers);
  }

  /// Writes layer l, folded, with its projections in `types.weights`.
  void fold_to(const fs::path& path, int64_t l, const StoredTypes& types) {
    const LayerPlan& plan = plan_.layers[static_cast<size_t>(l)];
    const LayerWeights weights = load_layer(checkpoint_, config_, l);
    const Bases bases = findings_.read_bases(l, config_, wants_);
    Bases next;
    if (plan.adapter) next = findings_.read_bases(l + 1, config_, wants_);
    const auto low_rank = [&](Projection p, const Matrix& m, int64_t rank) {
      return findings_.low_rank_of(l, p, m, rank, *algebra_);
    };
    const FoldJob job{
        config_, weights, bases, plan.adapter ? &next : nullptr, plan, choice_.form, choice_.after_gain,
        types,   low_rank};
    std::vector<FoldedTensor> tensors;
    fold_layer(job, l, *algebra_, pool_, [&](FoldedTensor&& tensor) {
      throw_if_interrupted();
      tensors.push_back(std::move(tensor));
    });
    release_layer(l);
    write_tensors(path, tensors, shard_metadata());
  }

  void write_layer(int64_t l) {
    const fs::path path = fs::path(partial_) / shard_name(l + 1);
    if (!fs::exists(path)) fold_to(path, l, options_.types);
    tick(kFoldUnits, layer_note("folding", l));
  }

  /// Layers one after another: the text, as the finished layers before pass it on, goes through the folded
  /// layer, which is then rounded for what its projections have read.
  void round_layers() {
    const Checkpoint outer_file = Checkpoint::open_file((fs::path(partial_) / shard_name(0)).string());
    const OuterWeights outer = load_stored_outer(outer_file, config_);
    Calibration calibration(outer, config_, backend_, *algebra_, tokens_, window_);
    for (int64_t l = 0; l < config_.layers; ++l) {
      const fs::path path = fs::path(partial_) / shard_name(l + 1);
      const LayerPlan& plan = plan_.layers[static_cast<size_t>(l)];
      if (fs::exists(path)) {
        tick(windows(), layer_note("rounding", l));
      } else {
        round_layer(calibration, path, l);
      }
      tick(kFoldUnits, layer_note("rounding", l));
      if (l + 1 == config_.layers) return tick(windows(), layer_note("rounding", l));
      const Checkpoint file = Checkpoint::open_file(path.string());
      Layer layer = load_stored_layer(file, config_, plan, l);
      const auto memory = place(layer, config_, backend_);
      calibration.walk(layer, l, Pass{}, [&] { tick(1, layer_note("passing", l)); });
    }
  }

  void round_layer(Calibration& calibration, const fs::path& path, int64_t l) {
    const fs::path folded = fs::path(partial_) / kFoldedFile;
    StoredTypes types = options_.types;
    types.weights = DType::f32;
    fold_to(folded, l, types);
    std::vector<FoldedTensor> tensors;
    {
      const Checkpoint file = Checkpoint::open_file(folded.string());
      const Layer layer = load_stored_layer(file, config_, plan_.layers[static_cast<size_t>(l)], l);
      auto moments = read_moments(calibration, file, l);
      for (size_t g = 0; g < moments.size(); ++g) {
        const RoundingFactor factor = rounding_factor(std::move(moments[g]), kRoundingDamping, *algebra_);
        for (const Projection p : layer.plan.groups[g].projections) {
          const std::string name = "layers." + std::to_string(l) + "." + projection_name(p);
          tensors.push_back(round_by_moments(name, layer.weights[p], *options_.types.weights, factor, pool_));
        }
      }
      copy_others(file, tensors);
    }
    write_tensors(path, tensors, shard_metadata());
    fs::remove(folded);
  }

  std::vector<Matrix> read_moments(Calibration& calibration, const Checkpoint& file, int64_t l) {
    Layer layer = load_stored_layer(file, config_, plan_.layers[static_cast<size_t>(l)], l);
    const auto memory = place(layer, config_, backend_);
    return calibration.read_moments(layer, l, [&] { tick(1, layer_note("rounding", l)); });
  }

  /// Tensors of the folded layer that were not rounded, as they are.
  static void copy_others(const Checkpoint& file, std::vector<FoldedTensor>& tensors) {
    std::set<std::string> there;
    for (const FoldedTensor& t : tensors) there.insert(t.name);
    for (const std::string& name : file.names()) {
      if (there.contains(name)) continue;
      const auto bytes = file.find_bytes(name);
      const Tensor t = bytes ? *bytes : *file.find(name);
      tensors.push_back({name, t.dtype, t.shape, std::vector<std::byte>(t.data, t.data + t.bytes)});
    }
  }

  /// Gives a layer's pages back, so that the resident size stays that of one layer.
  void release_layer(int64_t l) {
    const LayerWeights weights = load_layer(checkpoint_, config_, l);
    for (const Weight& w : weights.projection) release(w);
  }
  void release(const Weight& w) {
    Tensor tensor;
    tensor.data = static_cast<const std::byte*>(w.data);
    tensor.bytes = w.bytes();
    checkpoint_.release(tensor);
  }

  void write_outer() {
    const fs::path path = fs::path(partial_) / shard_name(0);
    if (fs::exists(path)) return tick(kFoldUnits, "embedding");
    const OuterWeights outer = load_outer(checkpoint_, config_);
    Bases first, last;
    if (choice_.form == Form::folded) {
      first = findings_.read_bases(0, config_, wants_);
      last = findings_.read_bases(config_.layers - 1, config_, wants_);
    }
    const bool rewrites = rewrites_stream(choice_.form, first);
    const DType embed = options_.types.embed.value_or(outer.embed.dtype);
    const DType head = options_.types.head.value_or(outer.head.dtype);
    // A quantised head is read by channels, the embedding by rows: they are never one tensor.
    const bool untied = rewrites || outer.head.data != outer.embed.data || head != embed || quantised(head);
    std::vector<SafetensorsWriter::Entry> entries = {
        stored_entry("embed", embed, config_.vocab, config_.dim)};
    if (untied) {
      entries.push_back(quantised(head) ? stored_entry("head", head, config_.dim, config_.vocab)
                                        : stored_entry("head", head, config_.vocab, config_.dim));
    }
    const bool keeps_gain = !rewrites && outer.norm_out;
    if (keeps_gain) entries.push_back({"norm_out", DType::f32, {config_.dim}});
    auto metadata = shard_metadata();
    metadata["larosa.plan"] = plan_to_json(plan_);
    const std::string temporary = path.string() + ".tmp";
    SafetensorsWriter writer(temporary, entries, metadata);
    write_table(writer, "embed", outer.embed, nullptr, first.stream, embed);
    const Matrix& final_basis = last.last();
    const float* gain = rewrites ? outer.norm_out : nullptr;
    if (untied && quantised(head)) {
      write_whole(writer, fold_columns("head", outer.head, gain, final_basis, head, *algebra_, pool_));
      release(outer.head);
    } else if (untied) {
      write_table(writer, "head", outer.head, gain, final_basis, head);
    }
    if (keeps_gain) writer.write("norm_out", 0, outer.norm_out, config_.dim * 4);
    writer.finish();
    fs::rename(temporary, path);
    tick(kFoldUnits, "embedding");
  }

  void write_table(SafetensorsWriter& writer, const std::string& name, const Weight& table, const float* gain,
                   const Matrix& basis, DType dtype) {
    constexpr int64_t kRows = 4096;
    const int64_t row_bytes = line_bytes(dtype, table.in);
    for (int64_t first = 0; first < table.out; first += kRows) {
      throw_if_interrupted();
      const int64_t count = std::min(kRows, table.out - first);
      const FoldedTensor part =
          stored_tensor(name, fold_rows(table, first, count, gain, basis, *algebra_, pool_), dtype, pool_);
      writer.write(name, first * row_bytes, part.bytes.data(), static_cast<int64_t>(part.bytes.size()));
    }
    release(table);
  }

  /// Writes what surrounds the tensors, drops the working files, and gives the directory its name.
  void complete() {
    nlohmann::json map = nlohmann::json::object();
    int64_t total = 0;
    for (int64_t i = 0; i <= config_.layers; ++i) {
      const Checkpoint shard = Checkpoint::open_file((fs::path(partial_) / shard_name(i)).string());
      for (const std::string& name : shard.names()) map[name] = shard_name(i);
      total += shard.bytes();
    }
    write_file((fs::path(partial_) / "model.safetensors.index.json").string(),
               nlohmann::json({{"metadata", {{"total_size", total}}}, {"weight_map", map}}).dump(1));
    std::ifstream in(fs::path(options_.source) / "config.json");
    nlohmann::json config = nlohmann::json::parse(in);
    config["architectures"] = {"LarosaForCausalLM"};
    config["larosa"] = {{"version", kPlanVersion},
                        {"method", plan_.method},
                        {"form", plan_.form},
                        {"sparsity", plan_.sparsity},
                        {"weights", plan_.notes["weights"]},
                        {"head", plan_.notes["head"]},
                        {"embedding", plan_.notes["embedding"]},
                        {"source", plan_.fingerprint}};
    if (plan_.notes.contains("adapters")) config["larosa"]["adapters"] = plan_.notes["adapters"];
    write_file((fs::path(partial_) / "config.json").string(), config.dump(2) + "\n");
    for (const char* name : kCopied) {
      const fs::path from = fs::path(options_.source) / name;
      if (fs::exists(from))
        fs::copy_file(from, fs::path(partial_) / name, fs::copy_options::overwrite_existing);
    }
    findings_.remove();
    fs::remove(fs::path(partial_) / kJobFile);
    fs::remove(fs::path(partial_) / kFoldedFile);
    vacant_path(output_);
    fs::rename(partial_, output_);
  }

  const SparsifyOptions& options_;
  std::span<const int32_t> tokens_;
  int64_t window_;
  Backend& backend_;
  const std::unique_ptr<Algebra> algebra_;
  ThreadPool& pool_;
  ModelConfig config_;
  Checkpoint checkpoint_;
  const Method& method_;
  Choice choice_;  // its sparsity is that of the projections
  Wants wants_;
  bool by_text_;  // layers' plans wait for the text
  bool gptq_;
  std::string output_, partial_;
  Findings findings_;
  std::optional<DirectoryLock> lock_;  // of the partial directory
  bool owned_ = false;                 // it is locked and holds this job
  Plan plan_;
  std::optional<Progress> progress_;
  int64_t done_ = 0;
};

}  // namespace

void sparsify(const SparsifyOptions& options, std::span<const int32_t> tokens, int64_t window,
              Backend& backend, ThreadPool& pool) {
  try {
    Job(options, tokens, window, backend, pool).run();
  } catch (const fs::filesystem_error& e) {
    fail(e.path1().string(), ": ", e.code().message());
  }
}

std::vector<int32_t> calibration_windows(std::span<const int32_t> text, int64_t window, int64_t count,
                                         const std::string& source) {
  const int64_t size = static_cast<int64_t>(text.size());
  if (size < window) fail(source, ": ", size, " tokens, calibration needs at least one window of ", window);
  count = std::clamp<int64_t>(count, 1, size / window);
  std::vector<int32_t> tokens;
  for (int64_t w = 0; w < count; ++w) {
    const int64_t first = count > 1 ? (size - window) * w / (count - 1) : 0;
    tokens.insert(tokens.end(), text.begin() + first, text.begin() + first + window);
  }
  return tokens;
}

}  // namespace larosa
