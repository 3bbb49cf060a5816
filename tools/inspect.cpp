// larosa inspect: what a model is and what a token costs.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "command.h"
#include "model/model.h"

namespace larosa {
namespace {

struct Flags {
  std::string model;
  bool json = false, tensors = false, verbose = false, check_tensors = false;
};

nlohmann::ordered_json describe(const Model& model) {
  using Json = nlohmann::ordered_json;
  const ModelConfig& c = model.config;
  const PlanShape shape = plan_shape(c);
  const TokenBytes bytes = token_bytes(model);
  Json sites = Json::object(), layers = Json::array();
  for (const Layer& layer : model.layers) {
    Json row = Json::object();
    for (Site site : kSites) {
      row[site_name(site)] = site_sparsity(layer.plan, site, shape);
    }
    layers.push_back(row);
  }
  for (Site site : kSites) sites[site_name(site)] = site_sparsity(model.plan, site, shape);
  return {{"architecture",
           {{"family", c.architecture},
            {"layers", c.layers},
            {"dim", c.dim},
            {"heads", c.heads},
            {"kv_heads", c.kv_heads},
            {"head_dim", c.head_dim},
            {"ffn", c.ffn},
            {"vocab", c.vocab},
            {"context", c.context},
            {"window", c.window},
            {"tied", c.tied}}},
          {"parameters", parameter_count(c)},
          {"bytes", model_bytes(model)},
          {"fingerprint", model.checkpoint->fingerprint()},
          {"plan",
           {{"method", model.plan.method},
            {"form", model.plan.form},
            {"source", model.plan.fingerprint},
            {"sparsity_asked", model.plan.sparsity},
            {"sparsity_weight_bytes", bytes.sparsity()},
            {"sparsity_varies", varies(model.plan)},
            {"notes", model.plan.notes},
            {"sites", sites},
            {"layers", layers}}},
          {"token_bytes",
           {{"projections", bytes.projections},
            {"projections_dense", bytes.projections_dense},
            {"low_rank", bytes.low_rank},
            {"adapters", bytes.adapters},
            {"score_weights_and_bases", bytes.thinning},
            {"head_norms_embedding_row", bytes.outer},
            {"kv_per_position", bytes.kv_per_position},
            {"sparse", bytes.sparse()},
            {"dense", bytes.dense()}}},
          {"ideal_speedup", static_cast<double>(bytes.dense()) / static_cast<double>(bytes.sparse())}};
}

void print_text(const nlohmann::ordered_json& j, bool verbose) {
  const auto section = [](const char* name, const nlohmann::ordered_json& values) {
    std::printf("%s\n", name);
    for (const auto& [key, value] : values.items()) {
      if (value.is_primitive())
        std::printf("  %-26s %s\n", key.c_str(),
                    value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
    }
  };
  section("architecture", j["architecture"]);
  std::printf("  %-26s %s\n", "parameters", j["parameters"].dump().c_str());
  std::printf("  %-26s %s\n", "bytes of tensors", j["bytes"].dump().c_str());
  std::printf("  %-26s %s\n", "fingerprint", j["fingerprint"].get<std::string>().c_str());
  section("plan", j["plan"]);
  section("notes", j["plan"]["notes"]);
  const auto row = [](const std::string& name, const nlohmann::ordered_json& sites) {
    std::printf("  %-26s", name.c_str());
    for (Site site : kSites)
      std::printf(" %s %5.1f %%", site_name(site), 100 * sites[site_name(site)].get<double>());
    std::printf("\n");
  };
  const bool expected = j["plan"]["sparsity_varies"].get<bool>();
  std::printf("entries dropped per site%s\n", expected ? " (thresholds: expected)" : "");
  row("mean", j["plan"]["sites"]);
  for (size_t l = 0; verbose && l < j["plan"]["layers"].size(); ++l)
    row("layer " + std::to_string(l), j["plan"]["layers"][l]);
  section(expected ? "bytes read per token (thresholds: expected)" : "bytes read per token",
          j["token_bytes"]);
  std::printf("ideal speed-up by bytes      %.3f\n", j["ideal_speedup"].get<double>());
}

/// A tensor as the model reads it: quantised lines by their type and the shape of their values.
Tensor logical_tensor(const Model& model, const std::string& name) {
  const auto bytes = model.checkpoint->find_bytes(name);
  if (!bytes) return *model.checkpoint->find(name);
  Tensor tensor = *bytes;
  if (const Weight* w = find_quantised(model, tensor)) {
    tensor.dtype = w->dtype;
    tensor.shape = {w->lines(), w->line_length()};
  }
  return tensor;
}

int run(const Flags& f) {
  const Model model = load_model(f.model);
  if (f.check_tensors) check_finite(model);
  auto j = describe(model);
  std::vector<Tensor> tensors;
  for (const std::string& name : f.tensors ? model.checkpoint->names() : std::vector<std::string>())
    tensors.push_back(logical_tensor(model, name));
  if (f.json) {
    for (const Tensor& t : tensors)
      j["tensors"].push_back({{"name", t.name}, {"dtype", dtype_name(t.dtype)}, {"shape", t.shape}});
    std::printf("%s\n", json_text(j).c_str());
    return 0;
  }
  print_text(j, f.verbose);
  for (const Tensor& t : tensors)
    std::printf("%-52s %-5s %s\n", t.name.c_str(), dtype_name(t.dtype), shape_text(t.shape).c_str());
  return 0;
}

}  // namespace

std::function<int()> setup_inspect(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  app.add_option("model,-m,--model", f->model, "Model directory")->required();
  app.add_flag("--json", f->json, "As JSON");
  app.add_flag("--tensors", f->tensors, "List all tensors");
  app.add_flag("-v,--verbose", f->verbose, "Every layer's sites");
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
  return [f] { return run(*f); };
}

}  // namespace larosa
