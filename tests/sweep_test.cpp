// Grids on a tiny random model: every cell once, the same rows after an interruption, a page with all of
// them.
#include "eval/sweep.h"

#include <map>
#include <set>

#include "base/progress.h"
#include "eval/plot.h"
#include "eval/report.h"
#include "eval/results.h"
#include "model_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

class SweepTest : public testing::Test {
 protected:
  SweepOptions options(const std::string& output) const {
    SweepOptions o;
    o.model = source_path("tests/golden/models/llama2-f16");
    o.output = dir_ / output;
    const int64_t vocab = load_config(o.model).vocab;
    o.methods = {method("larosa", "larosa"), method("topk:score=magnitude", "topk")};
    o.methods[1].options.choice.score = Score::magnitude;
    o.sparsities = {0.5, 0.25};
    o.texts = {{"a.txt", some_tokens(vocab, 64, 1)}, {"b \"<&.txt", some_tokens(vocab, 40, 2)}};
    o.dense_prompts = {0, 0.5};
    o.scoring.context = 16;
    o.calibration = some_tokens(vocab, 64, 3);
    o.calibration_window = 16;
    o.calibration_name = "calib.txt";
    o.speed_tokens = 0;
    o.ppl_percent = 0;
    o.progress = false;
    return o;
  }
  static SweepMethod method(const std::string& name, const std::string& base) {
    SweepMethod m{name, {}};
    m.options.method = base;
    return m;
  }
  void run(const SweepOptions& o) { sweep(o, *backend_, pool_); }
  std::vector<ResultRow> rows(const std::string& output) const {
    return results_from_csv(file_bytes(dir_ / (output + "/results.csv")), "results.csv");
  }
  /// Rows without the times, which no two runs share.
  static std::string timeless(std::vector<ResultRow> rows) {
    for (ResultRow& row : rows) row.seconds = row.sparsify_seconds = kMissing;
    return results_to_csv(rows);
  }

  TemporaryDir dir_;
  ThreadPool pool_{1};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
};

TEST_F(SweepTest, EveryCellOnce) {
  SweepOptions o = options("whole");
  o.layers = true;
  o.speed_tokens = 4;
  run(o);
  const auto found = rows("whole");
  ASSERT_EQ(found.size(), 4u * (1 + 2 * 2));  // views of dense and of every cell
  std::set<std::string> cells;
  for (const ResultRow& row : found) {
    cells.insert(row.method + std::to_string(row.sparsity) + row.text + std::to_string(row.dense_prompt));
    EXPECT_TRUE(row.refused.empty()) << row.refused;
    EXPECT_GT(row.ppl, 1);
    EXPECT_NEAR(row.reached, row.sparsity, 0.02) << row.method;
    EXPECT_GT(row.speed, 0);
    EXPECT_LE(row.total_bytes - row.adapter_bytes, row.dense_bytes * 1.02) << row.method;
    EXPECT_EQ(std::isnan(row.kl), row.method == "dense");
    EXPECT_EQ(row.adapter_bytes > 0, row.method == "larosa");
  }
  EXPECT_EQ(cells.size(), found.size());
  const auto layers = layers_from_csv(file_bytes(dir_ / "whole/layers.csv"), "layers.csv");
  EXPECT_EQ(layers.size(), 4u * static_cast<size_t>(load_config(o.model).layers));
  for (const LayerRow& row : layers) EXPECT_GT(row.kl, 0);
  for (const auto& entry : fs::directory_iterator(o.output)) {
    const std::string name = entry.path().filename().string();
    EXPECT_FALSE(name.starts_with("model-") || name.starts_with("kept-")) << name;
  }
}

TEST_F(SweepTest, ARowIsWhatPerplexitySays) {
  SweepOptions o = options("one");
  o.methods.resize(1);
  o.methods[0].options.choice.allocation = Allocation::lagrangian;
  run(o);  // 25 % first: 50 % takes its bases and curves
  SparsifyOptions made = o.methods[0].options;
  made.source = o.model, made.output = dir_ / "made", made.choice.sparsity = 0.5, made.progress = false;
  sparsify(made, o.calibration, o.calibration_window, *backend_, pool_);
  const Model sparse = load_model(made.output), dense = load_model(o.model);
  PerplexityOptions scoring = o.scoring;
  scoring.dense_prompt = 0.5;
  const auto expected = perplexity(sparse, &dense, *backend_, pool_, o.texts[1].tokens, scoring,
                                   [](const PerplexityResult&, int64_t) {});
  for (const ResultRow& row : rows("one")) {
    if (row.method != "larosa" || row.sparsity != 0.5 || row.text != o.texts[1].name ||
        row.dense_prompt != 0.5)
      continue;
    EXPECT_EQ(row.ppl, perplexity_of(expected.nll).value);
    EXPECT_EQ(row.kl, expected.kl.value);
    // The dense rows of a mode run in two parts, a reference in one.
    EXPECT_NEAR(row.dense_ppl, perplexity_of(expected.reference_nll).value, 1e-4 * row.dense_ppl);
    return;
  }
  FAIL() << "no such row";
}

TEST_F(SweepTest, GoesOnWhereItStopped) {
  const auto small = [&](const std::string& name) {
    SweepOptions o = options(name);
    o.texts.resize(1);
    return o;
  };
  run(small("whole"));
  for (const size_t stop : {size_t{1}, size_t{5}}) {
    const std::string name = "cut" + std::to_string(stop);
    SweepOptions o = small(name);
    size_t seen = 0;
    o.seen = [&](const ResultRow&) {
      if (++seen == stop) throw Interrupted{};
    };
    EXPECT_THROW(run(o), Interrupted);
    EXPECT_EQ(rows(name).size(), stop);
    const size_t before = seen;
    o.seen = [&](const ResultRow&) { ++seen; };
    run(o);
    EXPECT_EQ(seen - before, 10 - stop);
    EXPECT_EQ(timeless(rows(name)), timeless(rows("whole")));
    seen = 0;
    run(o);
    EXPECT_EQ(seen, 0u);
  }
}

TEST_F(SweepTest, OtherOptionsAreRefused) {
  run(options("begun"));
  SweepOptions o = options("begun");
  o.scoring.most_windows = 1;
  EXPECT_NE(message_of([&] { run(o); }).find("chunks was 0, now 1"), std::string::npos)
      << message_of([&] { run(o); });
  o = options("begun");
  o.texts[0].tokens[5] ^= 1;
  EXPECT_NE(message_of([&] { run(o); }).find("texts"), std::string::npos);
  o = options("begun");
  o.methods.pop_back();
  EXPECT_NE(message_of([&] { run(o); }).find("methods"), std::string::npos);
  o = options("begun");
  const std::string state = o.output + "/sweep.json", text = file_bytes(state), now = "\"version\": 4";
  ASSERT_NE(text.find(now), std::string::npos);
  std::ofstream(state) << std::string(text).replace(text.find(now), now.size(), "\"version\": 3");
  EXPECT_NE(message_of([&] { run(o); }).find("version is 3, expected 4"), std::string::npos);
  std::ofstream(dir_ / "text.txt") << "x";
  o = options("other");
  fs::create_directory(o.output);
  fs::copy(dir_ / "text.txt", o.output + "/mine.txt");
  EXPECT_NE(message_of([&] { run(o); }).find("is not empty and no sweep"), std::string::npos);
  o = options("twice");
  o.methods[1].name = "larosa";
  EXPECT_NE(message_of([&] { run(o); }).find("given twice"), std::string::npos);
  o.methods[1].name = "dense";
  EXPECT_NE(message_of([&] { run(o); }).find("\"dense\" is given twice"), std::string::npos);
  EXPECT_FALSE(fs::exists(o.output));
}

TEST_F(SweepTest, WhatAMethodCannotReachIsARowWithItsReason) {
  SweepOptions o = options("refused");
  o.methods = {method("h2 only", "topk")};
  o.methods[0].options.choice.site_scale = {0, 1, 0, 0};
  o.sparsities = {0.01, 0.5};
  run(o);
  size_t refused = 0;
  for (const ResultRow& row : rows("refused")) {
    if (row.sparsity != 0.5) continue;
    EXPECT_NE(row.refused.find("not reachable"), std::string::npos);
    EXPECT_TRUE(std::isnan(row.ppl));
    ++refused;
  }
  EXPECT_EQ(refused, 4u);
  EXPECT_NE(file_bytes(o.output + "/report.html").find("h2 only at 50 %: --sparsity 0.5: not reachable"),
            std::string::npos);
}

TEST_F(SweepTest, AMethodThatOffersNoneOfTheListIsRefusedRows) {
  SweepOptions o = options("none");
  o.texts.resize(1), o.dense_prompts = {0}, o.sparsities = {0.9};
  o.methods = {method("cats", "cats"), method("counted", "larosa")};
  o.methods[1].options.count_adapters = true;
  o.ppl_percent = 1;
  o.layers = true;
  run(o);
  const auto found = rows("none");
  ASSERT_EQ(found.size(), 3u);
  EXPECT_TRUE(found[1].refused.starts_with("--sparsity 0.9: method cats")) << found[1].refused;
  EXPECT_TRUE(found[2].refused.starts_with("--budget-includes-adapter: ")) << found[2].refused;
  const std::string page = file_bytes(o.output + "/report.html");
  for (const char* name : {"cats at 90 %: --sparsity 0.9", "counted at 90 %: --budget-includes-adapter"})
    EXPECT_NE(page.find(name), std::string::npos) << name;
}

TEST_F(SweepTest, WeightBytesAreThoseOfADeployedForm) {
  SweepOptions o = options("bytes");
  o.texts.resize(1), o.dense_prompts = {0}, o.sparsities = {0.3};
  o.methods = {method("folded", "larosa"), method("simulated", "larosa"), method("padded", "topk"),
               method("cuts", "teal")};
  o.methods[1].options.choice.form = Form::simulate;
  o.methods[2].options.types.weights = DType::int4;
  run(o);
  std::map<std::string, ResultRow> by_name;
  for (const ResultRow& row : rows("bytes")) by_name[row.method] = row;
  // Weights with the gain merged are stored wider than the source's: not what is counted.
  EXPECT_EQ(by_name["simulated"].weight_bytes, by_name["folded"].weight_bytes);
  EXPECT_TRUE(std::isnan(by_name["simulated"].total_bytes));
  const Model dense = load_model(o.model);
  const auto all = static_cast<double>(token_bytes(dense).projections_dense);
  EXPECT_EQ(by_name["dense"].weight_bytes, all);
  EXPECT_EQ(by_name["cuts"].weight_bytes, std::round((1 - by_name["cuts"].reached) * all));
  // Lines of int4 are padded to whole blocks, so that the projections' shares of bytes are not those of
  // weights.
  SparsifyOptions made = o.methods[2].options;
  made.source = o.model, made.output = dir_ / "made", made.choice.sparsity = 0.3, made.progress = false;
  sparsify(made, o.calibration, o.calibration_window, *backend_, pool_);
  const TokenBytes stored = token_bytes(load_model(made.output));
  EXPECT_EQ(by_name["padded"].weight_bytes, static_cast<double>(stored.projections));
  EXPECT_NE(by_name["padded"].weight_bytes,
            std::round((1 - by_name["padded"].reached) * static_cast<double>(stored.projections_dense)));
  EXPECT_EQ(by_name["padded"].total_bytes, static_cast<double>(stored.sparse()));
}

TEST_F(SweepTest, PathsAreTakenAsPeopleWriteThem) {
  EXPECT_EQ(model_name("models/demo-7m"), "demo-7m");
  EXPECT_EQ(model_name("models/demo-7m//"), "demo-7m");
  EXPECT_EQ(model_name("models/other/../demo-7m/."), "demo-7m");
  EXPECT_EQ(model_name("."), fs::current_path().filename().string());
  SweepOptions o = options("file");
  std::ofstream(o.output) << "x";
  EXPECT_EQ(message_of([&] { run(o); }), o.output + ": expected a directory to write in: Not a directory");
  o.output += "/below/";
  EXPECT_NE(message_of([&] { run(o); }).find("/below/: expected a directory"), std::string::npos);
}

TEST_F(SweepTest, PointsBelowTheGridAreMeasuredUntilTheCrossingIsNarrow) {
  SweepOptions o = options("share");
  o.texts.resize(1), o.dense_prompts = {0};
  o.sparsities = {0.5};
  o.methods.resize(1);
  o.ppl_percent = 1e-4;
  run(o);
  std::vector<Point> points;
  double dense = 0;
  size_t extra = 0;
  for (const ResultRow& row : rows("share")) {
    if (row.method == "dense")
      dense = row.ppl;
    else
      points.push_back({row.sparsity, row.ppl});
    extra += row.extra;
  }
  const Crossing c = ppl_crossing(points, dense, 1e-6);
  ASSERT_TRUE(c.between.has_value());
  EXPECT_EQ(extra, 4u);  // 1/2 → 1/32
  EXPECT_EQ(c.high - c.low, 1.0 / 32);
}

TEST_F(SweepTest, ThePageHoldsEveryCellAndNeedsNothingElse) {
  const SweepOptions o = options("page");
  run(o);
  const std::string page = file_bytes(o.output + "/report.html");
  for (const ResultRow& row : rows("page")) {
    char ppl[32];
    std::snprintf(ppl, sizeof(ppl), "%.3f", row.ppl);
    EXPECT_NE(page.find(ppl), std::string::npos) << row.method << row.sparsity;
  }
  EXPECT_EQ(page.find("{{"), std::string::npos);
  EXPECT_EQ(page.find("src="), std::string::npos);
  EXPECT_EQ(page.find("href=\"http"), std::string::npos);
  EXPECT_EQ(page.find("url("), std::string::npos);
  EXPECT_EQ(page.find("<&"), std::string::npos);  // the text's name is escaped
  EXPECT_NE(page.find("b &quot;&lt;&amp;.txt"), std::string::npos);
  // Variants of a method are not cut off, they break over lines; ● stands where narrow pages show it.
  EXPECT_NE(page.find("<td><span class=\"variant\">topk:<wbr>score=<wbr>magnitude</span></td>"),
            std::string::npos);
  EXPECT_NE(page.find("<th scope=\"col\">method</th><th scope=\"col\">front</th>"), std::string::npos);
  const std::string plot = file_bytes(o.output + "/plots/pareto-a.txt-0.svg");
  EXPECT_NE(plot.find("<style>"), std::string::npos);
  EXPECT_NE(plot.find("topk:score=magnitude"), std::string::npos);
  fs::remove(o.output + "/report.html");
  write_report(o.output);
  EXPECT_EQ(file_bytes(o.output + "/report.html"), page);
  EXPECT_NE(message_of([&] { write_report(dir_ / "nothing"); }).find("sweep.json"), std::string::npos);
}

TEST(Results, TableAndFileAreTheSame) {
  ResultRow row;
  row.method = "larosa:score=magnitude,pool=off";
  row.text = "a \"quoted\" name\n";
  row.sparsity = 0.1;
  row.extra = true;
  row.ppl = 1.0 / 3;
  row.site = {1, 2, 3, kMissing};
  const std::string csv = results_to_csv(std::span(&row, 1));
  const auto found = results_from_csv(csv, "x");
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].method, row.method);
  EXPECT_EQ(found[0].text, row.text);
  EXPECT_EQ(found[0].ppl, row.ppl);
  EXPECT_TRUE(found[0].extra);
  EXPECT_TRUE(std::isnan(found[0].site[3]));
  EXPECT_EQ(results_to_csv(found), csv);
  const auto refused = [&](std::string text, const std::string& from, const std::string& to) {
    text.replace(text.find(from), from.size(), to);
    return message_of([&] { results_from_csv(text, "x.csv"); });
  };
  EXPECT_EQ(refused(csv, ",0.1,", ",a,"), "x.csv: line 2: column sparsity is \"a\", expected a number");
  EXPECT_EQ(refused(csv, ",0.1,", ",nan,"), "x.csv: line 2: column sparsity is \"nan\", expected a number");
  EXPECT_EQ(refused(csv, ",0.1,", ","), "x.csv: line 2: 27 fields, expected 28");
  EXPECT_EQ(refused(csv, "kl_error", "kl_err"), "x.csv: line 1: column \"kl_err\" is unknown");
  EXPECT_EQ(refused(csv, "kl_error", "kl"), "x.csv: line 1: column \"kl\" stands there twice");
}

TEST(Results, CrossingIsInterpolatedInLogPerplexity) {
  const double dense = 10;
  const auto at = [&](std::vector<Point> points, double share) { return ppl_crossing(points, dense, share); };
  // Exponential in sparsity: exact.
  const Crossing exact = at({{0.5, 10 * std::exp(0.5)}, {0.25, 10 * std::exp(0.25)}}, std::exp(0.4) - 1);
  EXPECT_NEAR(exact.between.value(), 0.4, 1e-12);
  EXPECT_EQ(exact.low, 0.25);
  EXPECT_EQ(exact.high, 0.5);
  const Crossing first = at({{0.25, 11}}, 0.01);
  EXPECT_NEAR(first.between.value(), 0.25 * std::log(1.01) / std::log(1.1), 1e-12);
  EXPECT_EQ(first.low, 0);
  // A dip is no second crossing, and what never loses has none.
  EXPECT_EQ(at({{0.2, 10.05}, {0.3, 9.9}, {0.4, 10.2}}, 0.01).low, 0.3);
  const Crossing none = at({{0.2, 9}, {0.4, 10.01}}, 0.01);
  EXPECT_FALSE(none.between.has_value());
  EXPECT_EQ(none.high, 0.4);
}

TEST(Plot, EmptyAndExtremeNumbersAreDrawnOrLeftOut) {
  EXPECT_EQ(line_plot({"t", "x", "y", true, {{"a", 0, {{0.5, -1, ""}, {0.5, kMissing, ""}}}}}), "");
  const std::string one = line_plot({"t", "x", "y", true, {{"a <b>", 0, {{0.5, 20, "p"}}}}});
  EXPECT_NE(one.find("a &lt;b&gt;"), std::string::npos);
  EXPECT_EQ(one.find("nan"), std::string::npos);
  EXPECT_EQ(one.find("inf"), std::string::npos);
  HeatMap flat{"t", {"1", "2"}, {{"r", 0, {0.5, 0.5}}}, true, {}, {}};
  EXPECT_EQ(heat_map(flat).find("nan"), std::string::npos);
  flat.rows[0].values = {kMissing, kMissing};
  EXPECT_EQ(heat_map(flat), "");
  EXPECT_NE(bar_plot("t", "x", {{"a", 0, kMissing, "–"}, {"b", 1, 3, "3"}}).find(">b<"), std::string::npos);
}

}  // namespace
}  // namespace larosa
