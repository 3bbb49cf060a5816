// The table of methods. A new one is a file in methods/ and a row here.
#include "calib/methods.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "base/error.h"

namespace larosa {

extern const Method kDense, kTopk, kLarosa;

namespace {
constexpr double kMostSparse = 0.95;
}

std::span<const Method> methods() {
  static const std::array<Method, 3> table = {kLarosa, kTopk, kDense};
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

std::array<int64_t, 4> site_keeps(const ModelConfig& config, double sparsity,
                                  const std::array<double, 4>& site_scale) {
  if (!(sparsity >= 0 && sparsity <= kMostSparse))
    fail("--sparsity ", sparsity, ": expected a number in [0, ", kMostSparse, "]");
  std::array<double, 4> weights{};
  std::array<int64_t, 4> dim{};
  double total = 0;
  for (Projection p : kProjections) {
    const size_t site = static_cast<size_t>(site_of(p));
    const int64_t in = projection_in(config, p);
    weights[site] += static_cast<double>(in) * static_cast<double>(projection_out(config, p));
    dim[site] = in;
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
  std::array<int64_t, 4> keep{};
  for (size_t i = 0; i < 4; ++i) {
    keep[i] =
        std::clamp<int64_t>(std::llround(static_cast<double>(dim[i]) * (1.0 - site(high, i))), 1, dim[i]);
  }
  return keep;
}

Plan plan_model(const Method& method, const ModelConfig& config, const Choice& choice) {
  Plan plan;
  plan.method = method.name;
  plan.form = choice.form == Form::folded ? "folded" : "simulate";
  const LayerPlan layer = method.plan(choice, site_keeps(config, choice.sparsity, choice.site_scale));
  plan.layers.assign(static_cast<size_t>(config.layers), layer);
  if (method.wants(choice).stream && choice.form == Form::folded) {
    for (size_t l = 0; l + 1 < plan.layers.size(); ++l) plan.layers[l].adapter = true;
  }
  if (!thins(layer)) return plan;
  plan.sparsity = choice.sparsity;
  std::ostringstream scales;
  for (size_t i = 0; i < 4; ++i) scales << (i > 0 ? "," : "") << choice.site_scale[i];
  plan.notes = {{"score", choice.score == Score::norm ? "norm" : "magnitude"}, {"site_scale", scales.str()}};
  return plan;
}

LayerPlan topk_layer(const Choice& choice, const std::array<int64_t, 4>& keep,
                     const std::array<bool, 4>& rotated) {
  LayerPlan layer = dense_layer();
  for (Group& group : layer.groups) {
    const size_t site = static_cast<size_t>(site_of(group.projections[0]));
    group.rule.select = Select::topk;
    group.rule.keep = keep[site];
    group.rule.scaled = choice.score == Score::norm;
    group.rule.rotated = rotated[site];
  }
  return layer;
}

}  // namespace larosa
