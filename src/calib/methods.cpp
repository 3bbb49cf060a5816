// The table of methods. A new one is a file in methods/ and a row here.
#include "calib/methods.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "base/error.h"
#include "model/model.h"

namespace larosa {

extern const Method kDense, kTopk, kLarosa, kTeal, kWina, kCats, kRsparse;

std::span<const Method> methods() {
  static const std::array<Method, 7> table = {kLarosa, kTopk, kTeal, kWina, kCats, kRsparse, kDense};
  return table;
}

const Method& find_method(const std::string& name) {
  std::string known;
  for (const Method& method : methods()) {
    if (name == method.name) return method;
    known += (known.empty() ? "" : ", ") + std::string(method.name);
  }
  fail("--method ", name, ": unknown, expected one of: ", known);
}

Levels uniform_levels(const ModelConfig& config, double sparsity, const std::array<double, 4>& site_scale) {
  if (!(sparsity >= 0 && sparsity <= kMostSparse))
    fail("--sparsity ", sparsity, ": expected a number in [0, ", kMostSparse, "]");
  std::array<double, 4> weights{};
  double total = 0;
  for (Projection p : kProjections) {
    const size_t site = static_cast<size_t>(site_of(p));
    weights[site] +=
        static_cast<double>(projection_in(config, p)) * static_cast<double>(projection_out(config, p));
  }
  for (size_t i = 0; i < 4; ++i) {
    if (!(site_scale[i] >= 0 && site_scale[i] <= 100))
      fail("--site-scale ", site_scale[i], ": expected a number in [0, 100]");
    total += weights[i];
  }
  const auto site = [&](double s, size_t i) { return std::min(kMostSparse, s * site_scale[i]); };
  const auto reached = [&](double s) {
    double sum = 0;
    for (size_t i = 0; i < 4; ++i) sum += weights[i] * site(s, i) / total;
    return sum;
  };
  double low = 0, high = 1;
  while (reached(high) < sparsity && high < 1e6) high *= 2;
  if (reached(high) < sparsity - 1e-9)
    fail("--sparsity ", sparsity, ": not reachable with this --site-scale (a site drops at most 95 %)");
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (reached(middle) < sparsity ? low : high) = middle;
  }
  Levels levels{};
  for (Projection p : kProjections)
    levels[static_cast<size_t>(p)] = site(high, static_cast<size_t>(site_of(p)));
  return levels;
}

int64_t keep_of(int64_t dim, double level) {
  return std::clamp<int64_t>(std::llround(static_cast<double>(dim) * (1.0 - level)), 1, dim);
}

bool ends_basis(const ModelConfig& config, const Choice& choice, int64_t l) {
  return l + 1 == config.layers || (choice.basis_layers > 0 && (l + 1) % choice.basis_layers == 0);
}

LayerPlan plan_layer(const Method& method, const LayerTask& task) {
  LayerPlan layer = method.plan(task);
  const Wants wants = method.wants(task.choice);
  if (!wants.stream || task.choice.form != Form::folded) return layer;
  layer.middle = wants.mlp;
  layer.adapter =
      task.layer + 1 < task.config.layers && (wants.mlp || ends_basis(task.config, task.choice, task.layer));
  return layer;
}

Plan plan_model(const Method& method, const ModelConfig& config, const Choice& choice) {
  const Wants wants = method.wants(choice);
  if (wants.magnitudes && by_curves(choice)) {
    fail(choice.allocation == Allocation::sites ? "--site-scale search" : "--allocation lagrangian",
         ": method ", method.name, " needs a layer's cuts before the next layer is seen");
  }
  Plan plan;
  plan.method = method.name;
  plan.form = choice.form == Form::folded ? "folded" : "simulate";
  const Levels levels = uniform_levels(config, choice.sparsity, choice.site_scale);
  for (int64_t l = 0; l < config.layers; ++l)
    plan.layers.push_back(plan_layer(method, {config, choice, l, levels}));
  if (plan.layers[0] == trained_layer(config)) return plan;
  if (config.sparse_ratio > 0)
    fail("--method ", method.name,
         ": the model was trained to select its inputs itself (sparse_ratio), expected dense");
  plan.sparsity = choice.sparsity;
  if (wants.rotation)
    plan.notes["rotate"] = choice.rotate ? "on" : "off";
  else if (!wants.magnitudes)
    plan.notes["score"] = choice.score == Score::norm ? "norm" : "magnitude";
  if (std::ranges::any_of(plan.layers[0].groups, [](const Group& group) { return group.rank > 0; }))
    plan.notes["mix"] = std::to_string(choice.mix);
  if (!(choice.basis_weights >= 0 && choice.basis_weights <= 1e6))
    fail("--basis-weights ", choice.basis_weights, ": expected a number from 0 to 1e6");
  if (!(choice.shrink >= 0 && choice.shrink <= 1))
    fail("--shrink ", choice.shrink, ": expected a number from 0 to 1");
  constexpr const char* kCurrencies[] = {"relative", "update", "absolute", "none"};
  if (choice.allocation != Allocation::uniform)
    plan.notes["allocation"] = kAllocationNames[static_cast<size_t>(choice.allocation)];
  if (by_curves(choice)) {
    std::ostringstream shrink;
    shrink << choice.shrink;
    plan.notes["currency"] = kCurrencies[static_cast<int>(choice.currency)];
    plan.notes["shrink"] = shrink.str();
  }
  if (choice.allocation == Allocation::uniform) plan.notes["site_scale"] = site_scale_text(choice.site_scale);
  return plan;
}

std::string site_scale_text(const std::array<double, 4>& site_scale) {
  std::ostringstream text;
  for (size_t i = 0; i < 4; ++i) text << (i > 0 ? "," : "") << site_scale[i];
  return text.str();
}

Rule topk_rule(const LayerTask& task, Projection p) {
  Rule rule;
  rule.select = Select::topk;
  rule.keep = keep_of(projection_in(task.config, p), task.levels[static_cast<size_t>(p)]);
  rule.scaled = task.choice.score == Score::norm;
  return rule;
}

LayerPlan topk_layer(const LayerTask& task, const std::array<bool, 4>& rotated) {
  LayerPlan layer = dense_layer();
  for (Group& group : layer.groups) {
    group.rule = topk_rule(task, group.projections[0]);
    group.rule.rotated = rotated[static_cast<size_t>(site_of(group.projections[0]))];
  }
  return layer;
}

}  // namespace larosa
