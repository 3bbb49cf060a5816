// Plans: data in, the same data out; every refusal names the source and the field.
#include "plan/plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"

namespace larosa {
namespace {

using nlohmann::json;
using enum Projection;

constexpr PlanShape kShape = {2, {10, 20, 10, 40}, {100, 50, 50, 200, 400, 400, 400}};

Plan small_plan() {
  Plan plan;
  plan.method = "larosa";
  plan.form = "folded";
  plan.fingerprint = "0123456789abcdef";
  plan.sparsity = 0.5;
  plan.notes = {{"score", "norm"}};
  plan.layers = {dense_layer(), dense_layer()};
  return plan;
}

template <class Body>
void expect_refusal(Body body, const std::vector<std::string>& words) {
  std::string message;
  try {
    body();
  } catch (const Error& e) {
    message = e.what();
  }
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  for (const std::string& word : words)
    EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks \"" << word << "\"";
}

TEST(Plan, RandomPlansComeBackEqual) {
  std::mt19937_64 random(5);
  const auto below = [&](uint64_t n) { return random() % n; };
  for (int round = 0; round < 200; ++round) {
    Plan plan;
    plan.method = "method \"" + std::to_string(random()) + "\" \xc3\xa9\n";
    plan.form = below(2) ? "folded" : "simulate";
    plan.fingerprint = std::to_string(random());
    plan.sparsity = static_cast<double>(random() >> 11) * 0x1p-53;
    for (uint64_t n = below(4); n > 0; --n)
      plan.notes["note " + std::to_string(n)] = std::to_string(random());
    for (uint64_t n = below(5); n > 0; --n) {
      LayerPlan layer = dense_layer();
      if (below(2)) layer.groups.push_back({{up}, {}});
      if (below(2)) layer.groups.back().rank = 1 + static_cast<int64_t>(below(1u << 30));
      if (below(2)) layer.neurons = {Select::topk, 1 + static_cast<int64_t>(below(1u << 30))};
      layer.adapter = below(2);
      layer.middle = below(2);
      for (Group& group : layer.groups) {
        Rule& rule = group.rule;
        rule.select = static_cast<Select>(below(3));
        if (rule.select == Select::topk) rule.keep = 1 + static_cast<int64_t>(below(1u << 30));
        if (rule.select == Select::threshold)
          rule.cut = std::ldexp(static_cast<float>(below(1u << 24)), static_cast<int>(below(60)) - 50);
        if (rule.select == Select::threshold && below(2)) rule.keep = 1 + static_cast<int64_t>(below(99));
        rule.scaled = below(2);
        rule.rotated = below(2);
        rule.trained = below(2);
        rule.rescaled = below(2);
      }
      plan.layers.push_back(layer);
    }
    EXPECT_EQ(plan_from_json(plan_to_json(plan), "file"), plan);
  }
}

TEST(Plan, JsonRefusalsNameTheField) {
  const auto expect = [](const std::function<void(json&)>& change, const std::vector<std::string>& words) {
    Plan plan = small_plan();
    plan.layers[1].groups[0].rule = {Select::topk, 3};
    plan.layers[1].groups[1].rule = {Select::threshold, 0, 0.5f};
    json j = json::parse(plan_to_json(plan));
    change(j);
    std::vector<std::string> all = words;
    all.insert(all.end(), {"some.file", "plan"});
    expect_refusal([&] { plan_from_json(j.dump(), "some.file"); }, all);
  };
  const auto group = [](json& j, size_t g) -> json& { return j["layers"][1]["groups"][g]; };
  for (const char* name : {"version", "method", "form", "fingerprint", "sparsity", "notes", "layers"}) {
    expect([&](json& j) { j.erase(name); }, {name});
    expect([&](json& j) { j[name] = json::array({7}); }, {name});
  }
  for (const int other : {kPlanVersion - 1, kPlanVersion + 1})
    expect([&](json& j) { j["version"] = other; },
           {"version", std::to_string(other), "sparsify the source again"});
  expect([](json& j) { j["sparsity"] = 1.5; }, {"sparsity", "1.5"});
  expect([](json& j) { j["notes"]["score"] = 3; }, {"notes.score", "3"});
  expect([](json& j) { j["layers"][1] = 3; }, {"layers.1"});
  for (const char* name : {"groups", "adapter"}) {
    expect([&](json& j) { j["layers"][1].erase(name); }, {"layers.1." + std::string(name)});
    expect([&](json& j) { j["layers"][1][name] = 3; }, {"layers.1." + std::string(name)});
  }
  for (const char* name : {"select", "projections", "keep"}) {
    expect([&](json& j) { group(j, 0).erase(name); }, {"layers.1.groups.0." + std::string(name)});
    expect([&](json& j) { group(j, 0)[name] = true; }, {"layers.1.groups.0." + std::string(name)});
  }
  for (const char* name : {"scaled", "rotated", "trained", "rescaled"})
    expect([&](json& j) { group(j, 0)[name] = 1; }, {"layers.1.groups.0." + std::string(name)});
  expect([&](json& j) { group(j, 0)["select"] = "best"; }, {"groups.0.select", "best"});
  expect([&](json& j) { group(j, 0)["projections"][1] = "wz"; }, {"groups.0.projections", "wz"});
  for (const json& keep : {json(0), json(-1), json(2.5), json(UINT64_MAX)})
    expect([&](json& j) { group(j, 0)["keep"] = keep; }, {"groups.0.keep"});
  for (const json& keep : {json(0), json(-1), json("3")})
    expect([&](json& j) { group(j, 1)["keep"] = keep; }, {"groups.1.keep"});
  for (const json& rank : {json(0), json(-1), json(2.5), json("1")})
    expect([&](json& j) { group(j, 0)["rank"] = rank; }, {"layers.1.groups.0.rank"});
  expect([](json& j) { j["layers"][1]["neurons"] = 3; }, {"layers.1.neurons"});
  expect([](json& j) { j["layers"][1]["neurons"] = {{"select", "topk"}}; }, {"layers.1.neurons.keep"});
  for (const json& cut : {json(-0.5), json(1e300), json("1"), json()})
    expect([&](json& j) { group(j, 1)["cut"] = cut; }, {"layers.1.groups.1.cut"});
  for (const char* text : {"", "[]", "3", "{", "{\"version\":1,\"version\":1}"})
    expect_refusal([&] { plan_from_json(text, "some.file"); }, {"some.file", "plan"});
}

TEST(Plan, ValidateRefusals) {
  const auto expect = [](const std::function<void(Plan&)>& change, const std::vector<std::string>& words) {
    Plan plan = small_plan();
    change(plan);
    std::vector<std::string> all = words;
    all.push_back("some.file: plan");
    expect_refusal([&] { validate(plan, kShape, "some.file"); }, all);
  };
  EXPECT_NO_THROW(validate(small_plan(), kShape, "some.file"));
  expect([](Plan& p) { p.layers.pop_back(); }, {"1 layers", "2"});
  expect([](Plan& p) { p.layers[1].groups[0].projections.clear(); }, {"layer 1", "without projections"});
  expect([](Plan& p) { p.layers[1].groups[0].projections.push_back(wo); }, {"layer 1", "wo", "h1"});
  expect([](Plan& p) { p.layers[1].groups[0].projections.pop_back(); }, {"layer 1", "wv", "0 groups"});
  expect([](Plan& p) { p.layers[0].groups.push_back({{down}, {}}); }, {"layer 0", "down", "2 groups"});
  expect([](Plan& p) { p.layers[1].adapter = true; }, {"last layer", "adapter"});
  expect([](Plan& p) { p.layers[0].middle = true; }, {"layer 0", "middle", "no adapter"});
  for (const int64_t keep : {0, -3, 41})
    expect(
        [&](Plan& p) {
          p.layers[1].groups[3].rule = {Select::topk, keep};
        },
        {"layer 1", "down", "keep", "40"});
  for (const int64_t keep : {-3, 41})
    expect(
        [&](Plan& p) {
          p.layers[1].groups[3].rule = {Select::threshold, keep, 1};
        },
        {"layer 1", "down", "keep", "40"});
  const Rule half = {Select::topk, 5};
  expect([](Plan& p) { p.layers[1].groups[0].rank = 3; },
         {"layer 1", "wq", "rank is 3", "nothing is dropped"});
  expect([&](Plan& p) { p.layers[1].groups[0] = {{wq, wk, wv}, half, 6}; }, {"layer 1", "rank", "5 (wk)"});
  expect([&](Plan& p) { p.layers[1].groups[0] = {{wq, wk, wv}, half, -1}; }, {"layer 1", "rank is -1"});
  Rule rescaled = half;
  rescaled.rescaled = true;
  expect(
      [&](Plan& p) {
        p.layers[1].groups[0] = {{wq, wk, wv}, rescaled, 3};
      },
      {"layer 1", "rank", "rescaled"});
  expect([&](Plan& p) { p.layers[0].neurons = rescaled; }, {"layer 0", "neurons", "rescaled"});
  for (const bool rotated : {false, true}) {
    expect(
        [&](Plan& p) {
          Rule& rule = p.layers[1].groups[0].rule;
          rule = rescaled;
          rule.select = rotated ? Select::topk : Select::all;
          rule.rotated = rotated;
        },
        {"layer 1", "rescaled", "expected"});
  }
  expect([](Plan& p) { p.layers[0].neurons = {Select::topk, 41}; }, {"layer 0", "neurons", "keep", "40"});
  expect([](Plan& p) { p.layers[0].neurons = {Select::topk, 4, 0, true}; }, {"layer 0", "neurons", "scaled"});
  expect(
      [&](Plan& p) {
        p.layers[0].neurons = {Select::topk, 4};
        p.layers[0].groups[2].rule = half;
      },
      {"layer 0", "up", "topk", "neurons"});
  using limits = std::numeric_limits<float>;
  for (const float cut : {-1.0f, limits::infinity(), limits::quiet_NaN()})
    expect(
        [&](Plan& p) {
          p.layers[0].groups[1].rule = {Select::threshold, 0, cut};
        },
        {"layer 0", "wo", "cut"});
}

TEST(Plan, SparsityByHand) {
  Plan plan = small_plan();
  EXPECT_EQ(weight_sparsity(plan, kShape), 0);
  plan.layers[0].groups[0].rule = {Select::topk, 5};          // 100 of the 200 weights behind h1
  plan.layers[0].groups[3].rule = {Select::topk, 10};         // 100 of 400
  plan.layers[0].groups[1].rule = {Select::threshold, 0, 1};  // no fixed share
  EXPECT_DOUBLE_EQ(weight_sparsity(plan.layers[0], kShape), 400.0 / 1600);
  EXPECT_TRUE(varies(plan));
  EXPECT_DOUBLE_EQ(weight_sparsity(plan, kShape), 400.0 / 3200);
  EXPECT_DOUBLE_EQ(site_sparsity(plan.layers[0], Site::h1, kShape), 0.5);
  EXPECT_DOUBLE_EQ(site_sparsity(plan.layers[0], Site::h2, kShape), 0);
  EXPECT_DOUBLE_EQ(site_sparsity(plan.layers[0], Site::h4, kShape), 0.75);
  plan.layers[0].groups[1].rule.keep = 5;  // what is expected of the threshold
  EXPECT_DOUBLE_EQ(site_sparsity(plan.layers[0], Site::h2, kShape), 0.75);
  plan.layers[0].groups[1].rule.keep = 0;
  // A tenth of the neurons: of up's 400 weights 40, of down's 400 the same though its rule keeps more.
  LayerPlan chosen = dense_layer();
  chosen.neurons = {Select::topk, 4};
  EXPECT_DOUBLE_EQ(weight_sparsity(chosen, kShape), 360.0 / 1600);
  chosen.groups[3].rule = {Select::threshold, 0, 0};
  EXPECT_DOUBLE_EQ(weight_sparsity(chosen, kShape), 720.0 / 1600);
  // Half of wo, and 2 · (20 + 10) for what the other half goes through.
  LayerPlan low = dense_layer();
  low.groups[1] = {{wo}, {Select::topk, 10}, 2};
  EXPECT_DOUBLE_EQ(weight_sparsity(low, kShape), 1 - (1600 - 100 + 60) / 1600.0);
  // gate and up apart: the mean of the groups that read h3
  plan.layers[0].groups[2] = {{gate}, {Select::topk, 2}};
  plan.layers[0].groups.push_back({{up}, {Select::topk, 6}});
  EXPECT_DOUBLE_EQ(site_sparsity(plan.layers[0], Site::h3, kShape), (0.8 + 0.4) / 2);
  EXPECT_DOUBLE_EQ(weight_sparsity(plan.layers[0], kShape), (100 + 300 + 320 + 160) / 1600.0);
}

}  // namespace
}  // namespace larosa
