#include "plan/plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"

namespace larosa {
namespace {

using nlohmann::json;

constexpr const char* kSelectNames[] = {"all", "topk", "threshold"};
constexpr int64_t kMostRank = int64_t{1} << 32;

json rule_to_json(const Rule& rule) {
  json j = {{"select", kSelectNames[static_cast<int>(rule.select)]}};
  if (rule.select == Select::topk) j["keep"] = rule.keep;
  if (rule.select == Select::threshold) {
    j["cut"] = rule.cut;
    if (rule.keep > 0) j["keep"] = rule.keep;
  }
  if (rule.scaled) j["scaled"] = true;
  if (rule.rotated) j["rotated"] = true;
  if (rule.trained) j["trained"] = true;
  if (rule.rescaled) j["rescaled"] = true;
  return j;
}

Rule rule_from_json(const Fields& j) {
  Rule rule;
  const std::string select = j.text("select");
  const auto known = std::find(std::begin(kSelectNames), std::end(kSelectNames), select);
  if (known == std::end(kSelectNames)) j.refuse("select", "expected all, topk or threshold");
  rule.select = static_cast<Select>(known - std::begin(kSelectNames));
  if (rule.select == Select::topk) rule.keep = j.integer("keep", 1, int64_t{1} << 32);
  if (rule.select == Select::threshold) {
    rule.cut = static_cast<float>(j.number("cut", 0, double{std::numeric_limits<float>::max()}));
    rule.keep = j.find_integer("keep", 1, int64_t{1} << 32).value_or(0);
  }
  rule.scaled = j.boolean_or("scaled", false);
  rule.rotated = j.boolean_or("rotated", false);
  rule.trained = j.boolean_or("trained", false);
  rule.rescaled = j.boolean_or("rescaled", false);
  return rule;
}

const json& list(const Fields& j, const std::string& name) {
  if (!j.get(name).is_array()) j.refuse(name, "expected a list");
  return j.get(name);
}

std::vector<Projection> projections_from_json(const Fields& j) {
  std::vector<Projection> projections;
  for (const json& name : list(j, "projections")) {
    const auto known = std::find_if(kProjections.begin(), kProjections.end(),
                                    [&](Projection p) { return name == projection_name(p); });
    if (known == kProjections.end()) j.refuse("projections", "expected names from wq wk wv wo gate up down");
    projections.push_back(*known);
  }
  return projections;
}

json layer_to_json(const LayerPlan& layer) {
  json groups = json::array();
  for (const Group& group : layer.groups) {
    json names = json::array();
    for (Projection p : group.projections) names.push_back(projection_name(p));
    json j = rule_to_json(group.rule);
    j["projections"] = names;
    if (group.rank > 0) j["rank"] = group.rank;
    groups.push_back(j);
  }
  json j = {{"groups", groups}, {"adapter", layer.adapter}};
  if (layer.middle) j["middle"] = true;
  if (layer.neurons.select != Select::all) j["neurons"] = rule_to_json(layer.neurons);
  return j;
}

LayerPlan layer_from_json(const Fields& j, const std::string& where) {
  LayerPlan layer;
  for (const json& g : list(j, "groups")) {
    const Fields group(g, j.source(), where + "groups." + std::to_string(layer.groups.size()) + ".");
    const int64_t rank = group.find_integer("rank", 1, kMostRank).value_or(0);
    layer.groups.push_back({projections_from_json(group), rule_from_json(group), rank});
  }
  j.get("adapter");
  layer.adapter = j.boolean_or("adapter", false);
  layer.middle = j.boolean_or("middle", false);
  if (const json* neurons = j.find("neurons"))
    layer.neurons = rule_from_json(Fields(*neurons, j.source(), where + "neurons."));
  return layer;
}

void validate_rule(const Rule& rule, int64_t dim, const std::string& where) {
  if (rule.select == Select::topk && (rule.keep < 1 || rule.keep > dim)) {
    fail(where, ": keep is ", rule.keep, ", expected 1 to ", dim);
  }
  if (rule.select == Select::threshold && !(rule.cut >= 0 && std::isfinite(rule.cut))) {
    fail(where, ": cut is ", rule.cut, ", expected a finite number of at least 0");
  }
  if (rule.select == Select::threshold && (rule.keep < 0 || rule.keep > dim)) {
    fail(where, ": keep is ", rule.keep, ", expected at most ", dim);
  }
  if (rule.rescaled && (rule.select == Select::all || rule.rotated))
    fail(where, ": rescaled: expected a rule that selects entries as they are, not rotated");
}

void validate_rank(const Group& group, const PlanShape& shape, const std::string& where) {
  if (group.rank == 0) return;
  if (group.rule.select == Select::all || group.rule.rotated || group.rule.rescaled)
    fail(where, ": rank is ", group.rank,
         ", expected none where nothing is dropped or the rule is rotated or rescaled");
  for (Projection p : group.projections) {
    const int64_t most = std::min(shape.site_dim[static_cast<size_t>(site_of(p))], outputs(shape, p));
    if (group.rank < 0 || group.rank > most)
      fail(where, ": rank is ", group.rank, ", expected 0 to ", most, " (", projection_name(p), ")");
  }
}

void validate_neurons(const LayerPlan& layer, const PlanShape& shape, const std::string& where) {
  const Rule& rule = layer.neurons;
  if (rule.select == Select::all) return;
  validate_rule(rule, shape.site_dim[static_cast<size_t>(Site::h4)], where + ": neurons");
  if (rule.scaled || rule.rotated || rule.trained || rule.rescaled)
    fail(where,
         ": neurons: are chosen by |a(gate)| alone, expected neither scaled, rotated, trained nor rescaled");
  for (const Group& group : layer.groups) {
    const auto& all = group.projections;
    const bool has_up = std::find(all.begin(), all.end(), Projection::up) != all.end();
    if (has_up && group.rule.select != Select::all)
      fail(where, ": up: select is ", kSelectNames[static_cast<int>(group.rule.select)],
           ", expected all where neurons are chosen");
  }
}

}  // namespace

LayerPlan dense_layer() {
  using enum Projection;
  LayerPlan layer;
  layer.groups = {{{wq, wk, wv}, {}}, {{wo}, {}}, {{gate, up}, {}}, {{down}, {}}};
  return layer;
}

bool varies(const Plan& plan) {
  return std::any_of(plan.layers.begin(), plan.layers.end(), [](const LayerPlan& layer) {
    return layer.neurons.select == Select::threshold ||
           std::any_of(layer.groups.begin(), layer.groups.end(),
                       [](const Group& group) { return group.rule.select == Select::threshold; });
  });
}

int64_t low_rank_weights(const LayerPlan& layer, const PlanShape& shape) {
  int64_t sum = 0;
  for (const Group& group : layer.groups) {
    for (Projection p : group.projections)
      sum += group.rank * (shape.site_dim[static_cast<size_t>(site_of(p))] + outputs(shape, p));
  }
  return sum;
}

double kept_share(const Rule& rule, int64_t dim) {
  const bool counted = rule.select != Select::all && rule.keep > 0;
  return counted ? static_cast<double>(rule.keep) / static_cast<double>(dim) : 1.0;
}

std::string plan_to_json(const Plan& plan) {
  json layers = json::array();
  for (const LayerPlan& layer : plan.layers) layers.push_back(layer_to_json(layer));
  const json j = {{"version", kPlanVersion},   {"method", plan.method},
                  {"form", plan.form},         {"fingerprint", plan.fingerprint},
                  {"sparsity", plan.sparsity}, {"notes", plan.notes},
                  {"layers", layers}};
  return j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);  // a note may be a file's name
}

Plan plan_from_json(const std::string& text, const std::string& source) {
  const std::string name = source + ": plan";
  const json object = parse_json(text, name);
  const Fields j(object, name);
  if (j.get("version") != kPlanVersion)
    j.refuse("version", "expected " + std::to_string(kPlanVersion) +
                            ": other versions fold or store weights otherwise; sparsify the source again");
  Plan plan;
  plan.method = j.text("method");
  plan.form = j.text("form");
  plan.fingerprint = j.text("fingerprint");
  plan.sparsity = j.number("sparsity", 0, 1);
  j.get("notes");
  const Fields notes = *j.find_object("notes");
  for (const auto& [key, value] : notes.object().items()) plan.notes[key] = notes.text(key);
  for (const json& layer : list(j, "layers")) {
    const std::string where = "layers." + std::to_string(plan.layers.size()) + ".";
    plan.layers.push_back(layer_from_json(Fields(layer, name, where), where));
  }
  return plan;
}

void validate(const Plan& plan, const PlanShape& shape, const std::string& source) {
  if (static_cast<int64_t>(plan.layers.size()) != shape.layers) {
    fail(source, ": plan: ", plan.layers.size(), " layers, the model has ", shape.layers);
  }
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    std::array<int, 7> seen{};
    for (const Group& group : plan.layers[l].groups) {
      const std::string where = source + ": plan: layer " + std::to_string(l);
      if (group.projections.empty()) fail(where, ": a group without projections");
      const Site site = site_of(group.projections[0]);
      for (Projection p : group.projections) {
        if (site_of(p) != site) fail(where, ": ", projection_name(p), " does not read ", site_name(site));
        ++seen[static_cast<size_t>(p)];
      }
      validate_rule(group.rule, shape.site_dim[static_cast<size_t>(site)],
                    where + ": " + projection_name(group.projections[0]));
      validate_rank(group, shape, where + ": " + projection_name(group.projections[0]));
    }
    validate_neurons(plan.layers[l], shape, source + ": plan: layer " + std::to_string(l));
    for (Projection p : kProjections) {
      if (seen[static_cast<size_t>(p)] != 1) {
        fail(source, ": plan: layer ", l, ": ", projection_name(p), " stands in ",
             seen[static_cast<size_t>(p)], " groups, expected 1");
      }
    }
  }
  if (plan.layers.empty()) return;
  if (plan.layers.back().adapter) fail(source, ": plan: the last layer has an adapter");
  for (size_t l = 0; l + 1 < plan.layers.size(); ++l) {
    if (plan.layers[l].middle && !plan.layers[l].adapter)
      fail(source, ": plan: layer ", l, " changes basis in the middle and has no adapter");
  }
}

namespace {

/// Weights a token reads in a layer.
double weights_read(const LayerPlan& layer, const PlanShape& shape) {
  const double neurons = kept_share(layer.neurons, shape.site_dim[static_cast<size_t>(Site::h4)]);
  double read = 0;
  for (const Group& group : layer.groups) {
    for (Projection p : group.projections) {
      const int64_t dim = shape.site_dim[static_cast<size_t>(site_of(p))];
      double share = kept_share(group.rule, dim);
      if (p == Projection::up) share = std::min(share, neurons);
      if (p == Projection::down && group.rule.select != Select::all) share = std::min(share, neurons);
      read += static_cast<double>(shape.projection_weights[static_cast<size_t>(p)]) * share;
    }
  }
  return read + static_cast<double>(low_rank_weights(layer, shape));
}

double layer_total(const PlanShape& shape) {
  double total = 0;
  for (int64_t n : shape.projection_weights) total += static_cast<double>(n);
  return total;
}

}  // namespace

double weight_sparsity(const LayerPlan& layer, const PlanShape& shape) {
  return 1.0 - weights_read(layer, shape) / layer_total(shape);
}

double weight_sparsity(const Plan& plan, const PlanShape& shape) {
  if (plan.layers.empty()) return 0;
  double read = 0;
  for (const LayerPlan& layer : plan.layers) read += weights_read(layer, shape);
  return 1.0 - read / (layer_total(shape) * static_cast<double>(plan.layers.size()));
}

double site_sparsity(const LayerPlan& layer, Site site, const PlanShape& shape) {
  double dropped = 0;
  int groups = 0;
  for (const Group& group : layer.groups) {
    if (site_of(group.projections[0]) != site) continue;
    dropped += 1.0 - kept_share(group.rule, shape.site_dim[static_cast<size_t>(site)]);
    ++groups;
  }
  return groups ? dropped / groups : 0;
}

double site_sparsity(const Plan& plan, Site site, const PlanShape& shape) {
  double sum = 0;
  for (const LayerPlan& layer : plan.layers) sum += site_sparsity(layer, site, shape);
  return plan.layers.empty() ? 0 : sum / static_cast<double>(plan.layers.size());
}

}  // namespace larosa
