// larosa sparsify: flags and texts that are refused, types and budgets, and that an interruption or a full
// disk leaves nothing half-made and can be taken up again.
#include <chrono>
#include <csignal>
#include <map>
#include <thread>

#include "cli_fixture.h"
#include "eval/results.h"
#include "io/files.h"
#include "plan/plan.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

TEST_F(Cli, Calibration) {
  const std::string empty = dir_ / "empty.txt", brief = dir_ / "brief.txt";
  std::ofstream(empty).close();
  std::ofstream(brief) << "Too short.";
  const auto sparsify = [&](Arguments more) {
    Arguments a = {"sparsify", model(), "-o", dir_ / "made"};
    a.insert(a.end(), more.begin(), more.end());
    return a;
  };
  expect_refused(sparsify({"--calib", empty}), {"empty.txt", "empty"});
  expect_refused(sparsify({"--calib", brief}), {"brief.txt", "10 tokens", "128"});
  expect_refused(sparsify({}), {"--calib"});
  for (const char* s : {"-0.1", "0.96", "nan", "inf", "1e300"})
    expect_refused(sparsify({"--calib", text(), "--sparsity", s}), {"--sparsity"});
  expect_refused(sparsify({"--calib", text(), "--site-scale", "1,2,3"}), {"--site-scale"});
  expect_refused(sparsify({"--calib", text(), "--method", "magic"}), {"--method", "magic", "larosa"});
  expect_refused(sparsify({"--calib", text(), "--device", "tpu"}), {"device tpu", "cuda"});
  expect_refused(sparsify({"--calib", text(), "--device", "cuda:99"}), {"cuda"});
  expect_refused({"perplexity", model(), "-f", brief, "-c", "32"}, {"brief.txt", "10 tokens", "32"});
  fs::create_directory(dir_ / "there");
  expect_refused({"sparsify", model(), "-o", dir_ / "there", "--calib", text()}, {"there", "exists"});
  EXPECT_TRUE(fs::is_empty(dir_ / "there"));
}

TEST_F(Cli, FlagsThatAMethodDoesNotUse) {
  const auto sparsify = [&](const char* method, Arguments more) {
    Arguments a = {"sparsify", model(), "-o", dir_ / "made", "--method", method};
    a.insert(a.end(), more.begin(), more.end());
    return a;
  };
  expect_refused(sparsify("topk", {"--pool", "on"}), {"--pool", "topk"});
  expect_refused(sparsify("topk", {"--form", "simulate", "--select", "normalised"}), {"--select", "topk"});
  expect_refused(sparsify("dense", {"--sparsity", "0.5"}), {"--sparsity", "dense"});
  expect_refused(sparsify("dense", {"--allocation", "greedy"}), {"--allocation", "dense"});
  expect_refused(sparsify("teal", {"--score", "norm", "--calib", text()}), {"--score", "teal"});
  expect_refused(sparsify("teal", {}), {"--calib", "teal"});
  expect_refused(sparsify("topk", {"--calib-stream", "dense"}), {"--calib-stream", "topk"});
  expect_refused(sparsify("topk", {"--rotate", "off"}), {"--rotate", "topk"});
  expect_refused(sparsify("topk", {"--budget-includes-adapter"}), {"--budget-includes-adapter", "topk"});
  expect_refused(sparsify("topk", {"--currency", "absolute"}), {"--currency", "uniform"});
  expect_refused(sparsify("topk", {"--shrink", "0.5"}), {"--shrink", "uniform"});
  expect_refused(sparsify("larosa", {"--shrink", "2", "--calib", text()}), {"--shrink", "2"});
  for (const char* uniform : {"--preset=paper", "--site-scale=1,1,1,1", "--allocation=uniform"})
    expect_refused(sparsify("larosa", {uniform, "--shrink", "0", "--calib", text()}),
                   {"--shrink", "uniform"});
  expect_refused(sparsify("teal", {"--allocation", "lagrangian", "--calib", text()}), {"lagrangian", "teal"});
  for (const char* method : {"teal", "cats", "rsparse", "dense"})
    expect_refused(sparsify(method, {"--site-scale", "search", "--calib", text()}), {"--site-scale", method});
  expect_refused(sparsify("larosa", {"--site-scale", "search", "--allocation", "greedy"}),
                 {"--site-scale search", "greedy"});
  expect_refused(sparsify("larosa", {"--site-scale", "search", "--currency", "none"}), {"--currency none"});
  expect_refused(sparsify("topk", {"--site-scale", "search"}), {"--calib", "topk"});
  expect_refused(sparsify("topk", {"--site-scale", "find"}), {"--site-scale find", "search"});
  expect_refused(sparsify("wina", {"--bases", "separate"}), {"--bases", "wina"});
  for (const char* method : {"topk", "wina", "dense"})
    expect_refused(sparsify(method, {"--basis-weights", "0.1"}), {"--basis-weights", method});
  for (const char* share : {"-1", "nan", ""})
    expect_refused(sparsify("larosa", {"--basis-weights", share, "--calib", text()}), {"--basis-weights"});
  expect_refused(sparsify("wina", {"--score", "norm"}), {"--score", "wina"});
  expect_refused(sparsify("larosa", {"--bases", "h1", "--pool", "on", "--calib", text()}),
                 {"--pool", "--bases"});
  expect_refused(sparsify("topk", {"--allocation", "greedy", "--site-scale", "1,1,1,1"}),
                 {"--site-scale", "greedy"});
  expect_refused({"bench", "--config", dir_ / "config.json", "--random-weights", "--method", "teal"},
                 {"teal"});
  expect_refused({"sparsify", model(), "-o", "", "--method", "dense"}, {"-o"});
  ASSERT_EQ(run({"sparsify", model(), "-o", dir_ / "dense", "--method", "dense"}).code, 0);
  const auto plan = nlohmann::json::parse(run({"inspect", dir_ / "dense", "--json"}).out)["plan"];
  EXPECT_EQ(plan["sparsity_asked"], 0.0);
  EXPECT_FALSE(plan["notes"].contains("score"));
}

/// Of data and weights unless a preset or the command says otherwise.
TEST_F(Cli, TheDefaultBasisIsOfDataAndWeights) {
  const auto share = [&](const Arguments& options) -> std::string {
    const std::string made = dir_ / "share";
    fs::remove_all(made);
    Arguments a = {"sparsify", model(), "-o", made, "--calib", text()};
    a.insert(a.end(), options.begin(), options.end());
    EXPECT_EQ(run(a).code, 0);
    const auto notes = nlohmann::json::parse(run({"inspect", made, "--json"}).out)["plan"]["notes"];
    return notes.value("basis_weights", "none");
  };
  EXPECT_EQ(share({}), "0.3");
  EXPECT_EQ(share({"--basis-weights", "0"}), "none");
  EXPECT_EQ(share({"--preset", "paper"}), "none");
  EXPECT_EQ(share({"--preset", "paper", "--basis-weights", "0.2"}), "0.2");
}

TEST_F(Cli, SiteScalesAreFoundAndNamed) {
  const std::string made = dir_ / "made";
  const Arguments a = {"sparsify", model(), "-o", made, "--calib", text(), "--site-scale", "search"};
  const Outcome o = run(a);
  ASSERT_EQ(o.code, 0) << o.err;
  const auto plan = nlohmann::json::parse(run({"inspect", made, "--json"}).out)["plan"];
  const std::string found = plan["notes"]["site_scale"];
  EXPECT_EQ(std::count(found.begin(), found.end(), ','), 3) << found;
  EXPECT_NE(o.err.find("--site-scale " + found), std::string::npos) << o.err;
  fs::remove_all(made);
  // Resumed it is the same job, and numbers are another one.
  ASSERT_EQ(run(a, {"/dev/null", 24000}).code, 1);
  Arguments other = a;
  other.back() = found;
  EXPECT_NE(run(other).err.find("other options"), std::string::npos);
  EXPECT_EQ(run(a).code, 0);
  EXPECT_EQ(nlohmann::json::parse(run({"inspect", made, "--json"}).out)["plan"], plan);
  const Outcome swept = run({"sweep", model(), "--methods", "larosa:site-scale=search,shrink=0,topk",
                             "--sparsity", "0.25,0.5", "--calib", text(), "-f", text(), "-c", "32",
                             "--chunks", "2", "-o", dir_ / "grid", "--no-speed", "--ppl-share", "0"});
  ASSERT_EQ(swept.code, 0) << swept.err;
  const std::string csv = dir_ / "grid/results.csv";
  const auto rows = results_from_csv(file_bytes(csv), csv);
  EXPECT_EQ(std::ranges::count(rows, "larosa:site-scale=search,shrink=0", &ResultRow::method), 2);
}

TEST_F(Cli, CountedAdaptersMakeWayForOneBasis) {
  const std::string made = dir_ / "made", counted = "--budget-includes-adapter";
  const Arguments base = {"sparsify", model(), "-o", made, "--calib", text(), "--sparsity", "0.25"};
  const auto with = [&](const Arguments& more) {
    Arguments a = base;
    a.insert(a.end(), more.begin(), more.end());
    return a;
  };
  const auto expect = [&](const Arguments& more, bool adapters, const std::string& basis_layers) {
    const Outcome o = run(with(more));
    ASSERT_EQ(o.code, 0) << o.err;
    const auto j = nlohmann::json::parse(run({"inspect", made, "--json"}).out);
    EXPECT_EQ(j["token_bytes"]["adapters"] > 0, adapters) << more.back();
    EXPECT_EQ(j["plan"]["notes"].value("basis_layers", "1"), basis_layers) << more.back();
    EXPECT_EQ(j["plan"]["notes"].contains("budget"), more[0] == counted) << more.back();
    fs::remove_all(made);
  };
  expect({"--method", "larosa"}, true, "1");
  expect({counted}, false, "0");
  expect({counted, "--basis-layers", "0"}, false, "0");
  expect({counted, "--basis-layers", "1"}, true, "1");
  expect({counted, "--bases", "separate"}, true, "1");
  expect({counted, "--preset", "paper", "--form", "folded"}, true, "1");
  expect({counted, "--method", "wina"}, true, "1");
  expect_refused(with({counted, "--adapter-weights", "int8"}), {"--adapter-weights", "--basis-layers 1"});
  expect_refused(with({counted, "--form", "simulate"}), {counted, "has no adapters"});

  const std::string name = "larosa:budget-includes-adapter=true";
  const Outcome swept = run({"sweep", model(), "--methods", name + "," + name + ",basis-layers=1",
                             "--sparsity", "0.25", "--calib", text(), "-f", text(), "-c", "32", "--chunks",
                             "2", "-o", dir_ / "grid", "--no-speed", "--ppl-share", "0"});
  ASSERT_EQ(swept.code, 0) << swept.err;
  const std::string csv = dir_ / "grid/results.csv";
  for (const ResultRow& row : results_from_csv(file_bytes(csv), csv)) {
    if (row.method == "dense") continue;
    EXPECT_EQ(row.adapter_bytes > 0, row.method != name) << row.method;
  }

  // A resume needs what the flag came to mean.
  const Arguments begun = with({counted});
  ASSERT_EQ(run(begun, {"/dev/null", 24000}).code, 1);
  EXPECT_EQ(read_json(made + ".partial/job.json")["options"]["basis_layers"], 0);
  const Outcome refused = run(with({counted, "--basis-layers", "1"}));
  EXPECT_EQ(refused.code, 1);
  EXPECT_NE(refused.err.find("other options"), std::string::npos) << refused.err;
  EXPECT_EQ(run(begun).code, 0);
}

TEST_F(Cli, QuantisedWeights) {
  for (const std::string method : {"dense", "larosa", "cats", "rsparse"}) {
    const std::string made = dir_ / method;
    Arguments a = {"sparsify", model(),     "-o",   made,      "--method",
                   method,     "--weights", "int4", "--calib", text()};
    if (method != "dense") a.insert(a.end(), {"--sparsity", "0.3"});
    if (method == "rsparse") a.insert(a.end(), {"--mix", "0.6"});
    const Outcome o = run(a);
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(run({"run", made, "-p", "hello", "-n", "4", "--check-tensors"}).code, 0);
    const auto j = nlohmann::json::parse(run({"inspect", made, "--json", "--tensors"}).out);
    EXPECT_EQ(j["plan"]["notes"]["weights"], "int4");
    std::map<std::string, nlohmann::json> tensors;
    for (const auto& t : j["tensors"]) tensors[t["name"]] = t;
    const std::vector<int> shape = method == "cats" ? std::vector{56, 48} : std::vector{48, 56};
    EXPECT_EQ(tensors["layers.1.up"],
              nlohmann::json({{"name", "layers.1.up"}, {"dtype", "int4"}, {"shape", shape}}));
    EXPECT_EQ(tensors["head"], nlohmann::json({{"name", "head"}, {"dtype", "int8"}, {"shape", {260, 48}}}));
    EXPECT_EQ(tensors["embed"], nlohmann::json({{"name", "embed"}, {"dtype", "int8"}, {"shape", {260, 48}}}));
    EXPECT_EQ(read_json(made + "/config.json")["larosa"]["weights"], "int4");
    const Outcome bench = run({"bench", made, "-p", "8", "-n", "4", "-r", "1", "-o", "json"});
    EXPECT_EQ(bench.code, 0) << bench.err;
    if (method != "rsparse") continue;
    const int64_t rank = tensors["layers.1.up.low_in"]["shape"][0];
    EXPECT_LT(rank, 48);
    for (const auto& [name, sides] : {std::pair{"low_in", std::pair{rank, 48}}, {"low_out", {rank, 56}}}) {
      const std::string low = std::string("layers.1.up.") + name;
      EXPECT_EQ(tensors[low],
                nlohmann::json({{"name", low}, {"dtype", "int4"}, {"shape", {sides.first, sides.second}}}));
    }
    // What the operations read of the products of low rank is what the plan says.
    double read = 0;
    for (const auto& row : nlohmann::json::parse(
             run({"bench", made, "-p", "0", "-n", "4", "-r", "1", "--ops", "-o", "json"}).out)) {
      const std::string operation = row["operation"];
      if (operation == "matmul low_in" || operation == "matmul low_out")
        read += row["bytes_per_token"].get<double>();
    }
    EXPECT_EQ(read, j["token_bytes"]["low_rank"]);
  }
  const auto sparsify = [&](Arguments more) {
    Arguments a = {"sparsify", model(), "-o", dir_ / "made", "--calib", text()};
    a.insert(a.end(), more.begin(), more.end());
    return a;
  };
  expect_refused(sparsify({"--weights", "int5"}), {"--weights", "int5", "int4"});
  expect_refused(sparsify({"--head-weights", "u8"}), {"--head-weights", "u8"});
  expect_refused(sparsify({"--method", "topk", "--adapter-weights", "int8"}), {"--adapter-weights", "topk"});
  expect_refused(sparsify({"--form", "simulate", "--adapter-weights", "int8"}), {"--adapter-weights"});
  const Arguments random = {"bench", "--config", dir_ / "config.json", "--random-weights"};
  const auto bench = [&](Arguments more) {
    more.insert(more.begin(), random.begin(), random.end());
    return more;
  };
  expect_refused(bench({"--weights", "int4", "--save", dir_ / "made"}), {"--weights int4", "--save"});
  const Outcome o = run(bench({"--weights", "int4", "-p", "0", "-n", "4", "-r", "1"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("int4"), std::string::npos) << o.out;
  // Other types are another job: a resume does not mix them.
  ASSERT_EQ(run(sparsify({"--weights", "int8"}), {"/dev/null", 24000}).code, 1);
  EXPECT_NE(run(sparsify({"--weights", "int4"})).err.find("other options"), std::string::npos);
  EXPECT_EQ(run(sparsify({"--weights", "int8"})).code, 0);
}

TEST_F(Cli, FullDisk) {
  const Arguments a = {"sparsify", model(), "-o", dir_ / "made", "--calib", text()};
  const Outcome o = run(a, {"/dev/null", 24000});  // a basis fits, a layer does not
  EXPECT_EQ(o.code, 1);
  EXPECT_NE(o.err.find("made.partial; the same command resumes"), std::string::npos) << o.err;
  EXPECT_FALSE(fs::exists(dir_ / "made"));
  EXPECT_EQ(run(a).code, 0);  // resumes
  EXPECT_FALSE(fs::exists(dir_ / "made.partial"));
  const Outcome bench =
      run({"bench", "--config", dir_ / "config.json", "--random-weights", "--save", dir_ / "saved"},
          {"/dev/null", 16000});
  EXPECT_EQ(bench.code, 1);
  EXPECT_FALSE(fs::exists(dir_ / "saved"));
  EXPECT_FALSE(fs::exists(dir_ / "saved.partial"));
}

TEST_F(Cli, NothingIsLeftOfAStartThatFails) {
  // NaN weights show up in the first layer; a disk that is full at once leaves no finished part either.
  const std::string path = copy("bad") + "/" + shard_of("model.layers.0.self_attn.q_proj.weight");
  set_nan(path, "model.layers.0.self_attn.q_proj.weight");
  expect_refused({"sparsify", dir_ / "bad", "-o", dir_ / "made", "--calib", text()}, {"finite"});
  expect_refused({"perplexity", dir_ / "bad", "-f", text(), "-c", "32"}, {"not finite", "--check-tensors"});
  expect_refused({"sparsify", model(), "-o", dir_ / "made", "--calib", text()}, {"made.partial"},
                 {"/dev/null", 300});
}

TEST_F(Cli, AResumeNeedsTheSameConfigAndVersion) {
  const Arguments a = {"sparsify", copy("changed"), "-o", dir_ / "made", "--calib", text()};
  ASSERT_EQ(run(a, {"/dev/null", 24000}).code, 1);  // a basis fits, a layer does not
  ASSERT_TRUE(fs::exists(dir_ / "made.partial"));
  const auto refused = [&] {
    const Outcome o = run(a);
    EXPECT_EQ(o.code, 1);
    EXPECT_NE(o.err.find("other options, text or model"), std::string::npos) << o.err;
    EXPECT_FALSE(fs::exists(dir_ / "made"));
  };
  const std::string file = dir_ / "made.partial/job.json", job = file_bytes(file);
  const std::string now = "\"version\":" + std::to_string(kPlanVersion);
  ASSERT_NE(job.find(now), std::string::npos);
  std::ofstream(file) << std::string(job).replace(job.find(now), now.size(), "\"version\":1");
  refused();
  std::ofstream(file) << job;
  edit_json(dir_ / "changed/config.json", [](nlohmann::json& j) { j["rope_theta"] = 777777; });
  refused();
}

TEST_F(Cli, OneProcessPerOutput) {
  fs::create_directory(dir_ / "made.partial");
  {
    const DirectoryLock lock(dir_ / "made.partial");
    const Outcome o = run({"sparsify", model(), "-o", dir_ / "made", "--calib", text()});
    EXPECT_EQ(o.code, 1);
    EXPECT_NE(o.err.find("in use"), std::string::npos) << o.err;
    EXPECT_TRUE(fs::exists(dir_ / "made.partial"));
  }
  EXPECT_EQ(run({"sparsify", model(), "-o", dir_ / "made", "--calib", text()}).code, 0);  // empty: begun anew
}

TEST_F(Cli, InterruptedSparsifyResumes) {
  const Arguments to_whole = {"sparsify",       demo_model(), "-o",
                              dir_ / "whole",   "--calib",    source_path("text/demo.calib.txt"),
                              "--calib-tokens", "8192"};
  ASSERT_EQ(run(to_whole).code, 0);
  Arguments a = to_whole;
  a[3] = dir_ / "cut";
  const pid_t child = begin(a);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!fs::exists(dir_ / "cut.partial") && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  std::this_thread::sleep_for(std::chrono::milliseconds(150));
  kill(child, SIGINT);
  const Outcome o = end(child);
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_FALSE(fs::exists(dir_ / "cut"));
  EXPECT_EQ(run(a).code, 0);
  EXPECT_FALSE(fs::exists(dir_ / "cut.partial"));
  for (const auto& entry : fs::directory_iterator(dir_ / "whole")) {
    const std::string name = entry.path().filename().string();
    EXPECT_TRUE(file_bytes(dir_ / ("whole/" + name)) == file_bytes(dir_ / ("cut/" + name))) << name;
  }
}

}  // namespace
}  // namespace larosa
