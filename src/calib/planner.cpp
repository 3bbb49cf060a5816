#include "calib/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "calib/allocate.h"
#include "calib/shards.h"
#include "calib/sparsify_job.h"
#include "calib/statistics.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kCutTokens = 4096;  // of the calibration text that cuts are chosen on

/// What each group of the layer costs its output alone, the others read whole, by the currency of `choice`.
/// The layer as for find_plan.
std::vector<Curve> find_curves(const Method& method, LayerTask task, Layer& layer, Calibration& calibration) {
  std::vector<Curve> curves;
  Trial trial = calibration.trial(layer, task.layer);
  for (size_t g = 0; g < layer.plan.groups.size(); ++g) {
    Curve curve{group_weights(task.config, layer.plan.groups[g]), {}};
    for (const double level : kCurveLevels) {
      set_level(task.levels, layer.plan.groups[g], level);
      LayerPlan plan = method.plan(task);
      for (size_t other = 0; other < plan.groups.size(); ++other)
        if (other != g) plan.groups[other].rule.select = Select::all;
      const LayerError error = trial.error(plan);
      const bool update = task.choice.currency == Currency::update;
      const bool absolute = task.choice.currency == Currency::absolute;
      curve.errors.push_back(update ? error.update : absolute ? error.absolute : error.relative);
    }
    curves.push_back(std::move(curve));
  }
  return curves;
}

/// The plan of a layer that stands where `calibration` has come to. `layer`: as its outline (method.plan
/// without statistics) was folded, in float32. `task`: levels as uniform ones, no magnitudes.
LayerPlan find_plan(const Method& method, LayerTask task, Layer& layer, Calibration& calibration) {
  const bool cuts = method.wants(task.choice).magnitudes;
  LayerMagnitudes seen;
  if (cuts) {
    seen = calibration.magnitudes(layer, task.layer, Pass{true, nullptr});
    task.magnitudes = &seen;
  }
  if (task.choice.allocation == Allocation::greedy) {
    Trial trial = calibration.trial(layer, task.layer);
    task.levels = greedy_levels(task.config, layer.plan, task.choice.sparsity, [&](const Levels& levels) {
      LayerTask candidate = task;
      candidate.levels = levels;
      return trial.error(plan_layer(method, candidate)).relative;
    });
  }
  LayerPlan plan = plan_layer(method, task);
  if (!cuts || task.choice.stream == Stream::dense) return plan;
  // What reaches a site shrinks when the sites before it are thinned. The first one's cuts are right now,
  // and each round makes those of one more site right.
  for (size_t round = 1; round < kSites.size(); ++round) {
    layer.plan = plan;
    seen = calibration.magnitudes(layer, task.layer, Pass{});
    plan = plan_layer(method, task);
  }
  return plan;
}

/// The windows that plans are found on, and their length: whole ones for cuts, else what a trial looks at.
std::vector<int32_t> planning_tokens(const SparsifyJob& job, int64_t& window) {
  window = job.wants.magnitudes ? job.window : std::min(job.window, Trial::kWindow);
  const int64_t wanted = job.wants.magnitudes ? std::max<int64_t>(1, kCutTokens / window) : Trial::kWindows;
  const int64_t count = std::min(wanted, job.windows());
  std::vector<int32_t> tokens;
  for (int64_t w = 0; w < count; ++w) {
    const auto first = job.tokens.begin() + w * (job.windows() / count) * job.window;
    tokens.insert(tokens.end(), first, first + window);
  }
  return tokens;
}

LayerTask task_of(const SparsifyJob& job, int64_t l) {
  return {job.config, job.choice, l, uniform_levels(job.config, job.choice.sparsity, job.choice.site_scale)};
}

LayerPlan plan_from_findings(const SparsifyJob& job, int64_t l) {
  const auto at = static_cast<size_t>(l);
  Plan whole = job.plan;
  whole.layers[at] = job.findings.read_plan(l, job.plan.layers[at]);
  validate(whole, plan_shape(job.config), job.partial);
  return whole.layers[at];
}

/// Layer l's plan or curves, unless they are `found`, and the text on to the next layer.
void plan_next_layer(const SparsifyJob& job, Calibration& calibration, int64_t l, bool found) {
  const fs::path folded = folded_path(job);
  StoredTypes types = job.options.types;
  types.weights = types.adapters = DType::f32;
  fold_to(folded, job, l, types);
  const Checkpoint file = Checkpoint::open_file(folded.string());
  Layer layer = load_stored_layer(file, job.config, job.plan.layers[static_cast<size_t>(l)], l);
  const auto memory = place(layer, job.config, job.backend);
  if (!found && by_curves(job.choice)) {
    job.findings.write_curves(l, find_curves(job.method, task_of(job, l), layer, calibration));
  } else if (!found) {
    job.findings.write_plan(l, find_plan(job.method, task_of(job, l), layer, calibration));
  }
  if (!by_curves(job.choice)) layer.plan = plan_from_findings(job, l);
  const bool thinned = job.wants.magnitudes && job.choice.stream == Stream::thinned;
  if (l + 1 < job.config.layers) calibration.walk(layer, l, Pass{!thinned, nullptr}, throw_if_interrupted);
  fs::remove(folded);
}

/// The layers' plans from the curves of all of them.
void share_out(SparsifyJob& job, const std::vector<Curve>& curves) {
  const double sparsity = job.choice.sparsity;
  std::vector<double> levels;
  if (job.choice.currency == Currency::none) {
    const size_t groups = job.plan.layers[0].groups.size();
    for (auto first = curves.begin(); first != curves.end(); first += static_cast<ptrdiff_t>(groups)) {
      const std::vector<Curve> own(first, first + static_cast<ptrdiff_t>(groups));
      for (const double own_level : lagrangian_levels(own, sparsity)) levels.push_back(own_level);
    }
  } else {
    levels = lagrangian_levels(curves, sparsity);
  }
  auto level = levels.begin();
  for (int64_t l = 0; l < job.config.layers; ++l) {
    LayerTask task = task_of(job, l);
    LayerPlan& plan = job.plan.layers[static_cast<size_t>(l)];
    for (const Group& group : plan.groups) {
      const double uniform = task.levels[static_cast<size_t>(group.projections[0])];
      set_level(task.levels, group, std::lerp(*level++, uniform, job.choice.shrink));
    }
    plan = plan_layer(job.method, task);
  }
}

/// The layers' plans by the site scales that the curves of all of them ask for.
void scale_sites(SparsifyJob& job, const std::vector<Curve>& curves) {
  Choice& choice = job.choice;
  choice.site_scale = search_site_scale(job.plan.layers, curves, choice.sparsity, choice.shrink);
  const std::string found = job.plan.notes["site_scale"] = site_scale_text(choice.site_scale);
  std::fprintf(stderr, "sparsify: --site-scale %s found\n", found.c_str());
  for (int64_t l = 0; l < job.config.layers; ++l)
    job.plan.layers[static_cast<size_t>(l)] = plan_layer(job.method, task_of(job, l));
}

}  // namespace

bool plans_by_text(const Method& method, const Choice& choice) {
  return method.wants(choice).magnitudes || choice.allocation != Allocation::uniform;
}

void plan_layers(SparsifyJob& job) {
  const ModelConfig& config = job.config;
  const Findings& findings = job.findings;
  int64_t finished = 0;
  while (finished < config.layers &&
         (by_curves(job.choice) ? findings.has_curves(finished) : findings.has_plan(finished)))
    ++finished;
  int64_t window = 0;
  const std::vector<int32_t> tokens = planning_tokens(job, window);
  Calibration calibration(load_outer(job.checkpoint, config), config, job.backend, *job.algebra, tokens,
                          window);
  const Bases first = job.choice.form == Form::folded ? findings.read_bases(0, config, job.wants) : Bases{};
  if (!first.stream.empty()) calibration.turn(first.stream);
  std::vector<Curve> curves;
  for (int64_t l = 0; l < config.layers; ++l) {
    if (finished < config.layers) plan_next_layer(job, calibration, l, l < finished);
    LayerPlan& plan = job.plan.layers[static_cast<size_t>(l)];
    if (by_curves(job.choice)) {
      const std::vector<Curve> found = findings.read_curves(l, config, plan);
      curves.insert(curves.end(), found.begin(), found.end());
    } else {
      plan = plan_from_findings(job, l);
    }
    job.tick(kPlanUnits, job.layer_note("planning", l));
  }
  if (job.choice.allocation == Allocation::lagrangian) share_out(job, curves);
  if (job.choice.allocation == Allocation::sites) scale_sites(job, curves);
  validate(job.plan, plan_shape(config), job.partial);
}

}  // namespace larosa
