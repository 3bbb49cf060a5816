// larosa eval: what is refused before anything is computed, and Ctrl-C.
#include <chrono>
#include <csignal>
#include <thread>

#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

TEST_F(Cli, EvalRefusesBeforeItComputes) {
  const std::string data = source_path("tests/golden/tasks");
  const Arguments a = {"eval", model(), "--data", data, "-o", dir_ / "made", "--tasks"};
  const auto tasks = [&](const std::string& names, const Arguments& more = {}) {
    Arguments all = a;
    all.push_back(names);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  expect_refused(tasks("piqa,arc"), {"--tasks arc", "arc_easy", "lambada"});
  expect_refused(tasks("piqa,piqa"), {"--tasks piqa", "twice"});
  Arguments nowhere = tasks("piqa");
  nowhere[3] = dir_ / "none";
  expect_refused(nowhere, {"none/piqa.jsonl", "cannot be opened"});
  expect_refused(tasks("piqa", {"--samples", dir_ / "none/s.jsonl"}), {"none/s.jsonl", "does not exist"});
  expect_refused(tasks("piqa", {"--limit", "0"}), {"--limit"});
  expect_refused(tasks("piqa", {"--samples", dir_ / "made"}), {"--samples", "is also -o"});
  expect_refused(tasks("piqa", {"--samples", dir_ / ""}), {"is a directory"});
  fs::copy(model(), dir_ / "mute");
  fs::remove(dir_ / "mute/tokenizer.json");
  Arguments mute = tasks("piqa");
  mute[1] = dir_ / "mute";
  expect_refused(mute, {"mute", "no tokenizer.json"});
}

TEST_F(Cli, InterruptedEvalResumes) {
  std::string questions;
  for (int i = 0; i < 60; ++i) questions += file_bytes(source_path("tests/golden/tasks/arc_easy.jsonl"));
  std::ofstream(dir_ / "arc_easy.jsonl") << questions;
  const Arguments whole = {"eval",         model(), "--tasks",           "arc_easy",  "--data",
                           dir_ / "",      "-o",    dir_ / "whole.json", "--samples", dir_ / "whole.jsonl",
                           "--no-progress"};
  const Outcome found = run(whole);
  ASSERT_EQ(found.code, 0) << found.err;
  EXPECT_NE(found.out.find("| arc_easy         |   180 | acc        | ↑ |"), std::string::npos) << found.out;
  Arguments cut = whole;
  cut[7] = dir_ / "cut.json", cut[9] = dir_ / "cut.jsonl";
  const pid_t child = begin(cut);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  const auto lines = [&] {
    const std::string text = file_bytes(dir_ / "cut.json.partial");
    return std::count(text.begin(), text.end(), '\n');
  };
  while (lines() < 3 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kill(child, SIGINT);
  const Outcome o = end(child);
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_NE(o.err.find("cut.json.partial"), std::string::npos) << o.err;
  EXPECT_FALSE(fs::exists(dir_ / "cut.json"));
  EXPECT_GE(lines(), 3);
  Arguments other = cut;
  other.insert(other.end(), {"--kv", "f16"});
  expect_refused(other, {"cut.json.partial:1", "other options"});
  edit_json(copy("turned") + "/config.json", [](nlohmann::json& j) { j["rope_theta"] = 77.0; });
  Arguments turned = cut;
  turned[1] = dir_ / "turned";
  expect_refused(turned, {"cut.json.partial:1", "another model"});
  ASSERT_EQ(run(cut).code, 0);
  EXPECT_FALSE(fs::exists(dir_ / "cut.json.partial"));
  EXPECT_TRUE(file_bytes(dir_ / "cut.json") == file_bytes(dir_ / "whole.json"));
  EXPECT_TRUE(file_bytes(dir_ / "cut.jsonl") == file_bytes(dir_ / "whole.jsonl"));
}

}  // namespace
}  // namespace larosa
