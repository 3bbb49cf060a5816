#include "plan/plan.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace larosa {
namespace {

using nlohmann::json;

constexpr const char* kSelectNames[] = {"all", "topk", "threshold"};
constexpr int kVersion = 1;

json rule_to_json(const Rule& rule) {
  json j = {{"select", kSelectNames[static_cast<int>(rule.select)]}};
  if (rule.select == Select::topk) j["keep"] = rule.keep;
  if (rule.select == Select::threshold) j["cut"] = rule.cut;
  if (rule.scaled) j["scaled"] = true;
  if (rule.rotated) j["rotated"] = true;
  return j;
}

Rule rule_from_json(const json& j) {
  Rule rule;
  const std::string select = j.at("select").get<std::string>();
  int index = 0;
  while (index < 3 && select != kSelectNames[index]) ++index;
  if (index == 3) fail("select \"", select, "\" is unknown (all, topk, threshold)");
  rule.select = static_cast<Select>(index);
  if (rule.select == Select::topk) {
    if (!j.at("keep").is_number_integer()) fail("keep is not a whole number");
    rule.keep = j.at("keep").get<int64_t>();
  }
  if (rule.select == Select::threshold) rule.cut = j.at("cut").get<float>();
  rule.scaled = j.value("scaled", false);
  rule.rotated = j.value("rotated", false);
  return rule;
}

Projection projection_from_name(const std::string& name) {
  for (Projection p : kProjections) {
    if (name == projection_name(p)) return p;
  }
  fail("projection \"", name, "\" is unknown");
}

json layer_to_json(const LayerPlan& layer) {
  json groups = json::array();
  for (const Group& group : layer.groups) {
    json names = json::array();
    for (Projection p : group.projections) names.push_back(projection_name(p));
    json j = rule_to_json(group.rule);
    j["projections"] = names;
    groups.push_back(j);
  }
  return {{"groups", groups}, {"adapter", layer.adapter}};
}

LayerPlan layer_from_json(const json& j) {
  LayerPlan layer;
  for (const json& g : j.at("groups")) {
    Group group{{}, rule_from_json(g)};
    for (const json& name : g.at("projections"))
      group.projections.push_back(projection_from_name(name.get<std::string>()));
    layer.groups.push_back(std::move(group));
  }
  layer.adapter = j.at("adapter").get<bool>();
  return layer;
}

void validate_rule(const Rule& rule, int64_t dim, const std::string& where) {
  if (rule.select == Select::topk && (rule.keep < 1 || rule.keep > dim)) {
    fail(where, ": keep is ", rule.keep, ", expected 1 to ", dim);
  }
  if (rule.select == Select::threshold && !(rule.cut >= 0 && std::isfinite(rule.cut))) {
    fail(where, ": cut is ", rule.cut, ", expected a finite number of at least 0");
  }
}

}  // namespace

LayerPlan dense_layer() {
  using enum Projection;
  return {{{{wq, wk, wv}, {}}, {{wo}, {}}, {{gate, up}, {}}, {{down}, {}}}, false};
}

std::string plan_to_json(const Plan& plan) {
  json layers = json::array();
  for (const LayerPlan& layer : plan.layers) layers.push_back(layer_to_json(layer));
  const json j = {{"version", kVersion},       {"method", plan.method},
                  {"form", plan.form},         {"fingerprint", plan.fingerprint},
                  {"sparsity", plan.sparsity}, {"notes", plan.notes},
                  {"layers", layers}};
  return j.dump();
}

Plan plan_from_json(const std::string& text, const std::string& source) {
  try {
    const json j = json::parse(text);
    if (j.at("version") != kVersion) fail("version is ", j.at("version").dump(), ", expected ", kVersion);
    Plan plan;
    plan.method = j.at("method").get<std::string>();
    plan.form = j.at("form").get<std::string>();
    plan.fingerprint = j.at("fingerprint").get<std::string>();
    plan.sparsity = j.at("sparsity").get<double>();
    plan.notes = j.at("notes").get<std::map<std::string, std::string>>();
    for (const json& layer : j.at("layers")) plan.layers.push_back(layer_from_json(layer));
    return plan;
  } catch (const json::exception& e) {
    fail(source, ": plan: ", e.what());
  } catch (const Error& e) {
    fail(source, ": plan: ", e.what());
  }
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
    }
    for (Projection p : kProjections) {
      if (seen[static_cast<size_t>(p)] != 1) {
        fail(source, ": plan: layer ", l, ": ", projection_name(p), " stands in ",
             seen[static_cast<size_t>(p)], " groups, expected 1");
      }
    }
  }
  if (!plan.layers.empty() && plan.layers.back().adapter)
    fail(source, ": plan: the last layer has an adapter");
}

namespace {

double kept_share(const Rule& rule, int64_t dim) {
  return rule.select == Select::topk ? static_cast<double>(rule.keep) / static_cast<double>(dim) : 1.0;
}

/// Weights a token reads in a layer.
double weights_read(const LayerPlan& layer, const PlanShape& shape) {
  double read = 0;
  for (const Group& group : layer.groups) {
    for (Projection p : group.projections) {
      read += static_cast<double>(shape.projection_weights[static_cast<size_t>(p)]) *
              kept_share(group.rule, shape.site_dim[static_cast<size_t>(site_of(p))]);
    }
  }
  return read;
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

}  // namespace larosa
