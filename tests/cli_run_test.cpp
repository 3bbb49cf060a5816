// larosa run: prompts that are refused, and Ctrl-C in a prompt and in a text.
#include <chrono>
#include <csignal>
#include <thread>

#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

TEST_F(Cli, Prompts) {
  const std::string empty = dir_ / "empty.txt";
  std::ofstream(empty).close();
  expect_refused({"run", model(), "-p", ""}, {"-p", "empty"});
  expect_refused({"run", model(), "-f", empty}, {"empty.txt", "empty"});
  expect_refused({"run", model(), "-f", "-"}, {"empty"});
  expect_refused({"run", model(), "-f", dir_ / "absent.txt"}, {"absent.txt"});
  expect_refused({"run", model(), "-f", "/proc/self/mem"}, {"/proc/self/mem", "cannot be read"});
  expect_refused({"run", model(), "-f", text()}, {"4000 tokens", "128"});
  expect_refused({"run", model()}, {"-p", "-f"});
  expect_refused({"run", model(), "-p", "x", "--temp", "-1"}, {"--temp"});
  expect_refused({"run", model(), "-p", "x", "--top-p", "2"}, {"--top-p"});
  expect_refused({"run", model(), "-p", "x", "-c", "1000"}, {"-c 1000", "128"});
  expect_refused({"run", dir_ / "none", "-p", "x"}, {"none"});
  EXPECT_EQ(run({"run", model(), "-f", "-", "-n", "1"}, {text()}).code, 1);
}

TEST_F(Cli, ALongPromptCanBeInterrupted) {
  fs::copy(demo_model(), dir_ / "long");
  edit_json(dir_ / "long/config.json", [](nlohmann::json& j) { j["max_position_embeddings"] = 200000; });
  const pid_t child =
      begin({"run", dir_ / "long", "-f", source_path("text/demo.valid.txt"), "-n", "1", "-t", "1"});
  std::this_thread::sleep_for(std::chrono::seconds(2));
  ASSERT_EQ(waitpid(child, nullptr, WNOHANG), 0) << "the prompt was over at once";
  const auto asked = std::chrono::steady_clock::now();
  kill(child, SIGINT);
  EXPECT_EQ(end(child).code, 130);
  EXPECT_LT(std::chrono::steady_clock::now() - asked, std::chrono::seconds(5));
}

TEST_F(Cli, InterruptedRunKeepsItsText) {
  const pid_t child = begin({"run", demo_model(), "-p", "It was", "-n", "500", "--ignore-eos", "-t", "1"});
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (file_bytes(dir_ / "out.log").size() < 20 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kill(child, SIGINT);
  const Outcome o = end(child);
  EXPECT_TRUE(o.code == 130 || o.code == 0) << o.code << o.err;  // 0: it was faster than the signal
  EXPECT_NE(o.err.find("decode:"), std::string::npos) << o.err;
}

}  // namespace
}  // namespace larosa
