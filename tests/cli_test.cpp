// The command as a user meets it, whatever the subcommand: the tour of all of them, flags, outputs.
#include <regex>

#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

TEST_F(Cli, TheUndamagedModelRuns) {
  const Outcome o = run({"run", model(), "-p", "hello", "-n", "4", "--seed", "1", "--ignore-eos"});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_FALSE(o.out.empty());
  EXPECT_NE(o.err.find("tokens/s"), std::string::npos);
  EXPECT_EQ(run({"sparsify", model(), "-o", dir_ / "sparse", "--calib", text()}).code, 0);
  EXPECT_EQ(run({"run", dir_ / "sparse", "-f", text(), "-c", "0"}).code, 1);  // longer than the context
  const Outcome ppl =
      run({"perplexity", dir_ / "sparse", "-f", text(), "-c", "32", "--against", model(), "--json"});
  EXPECT_EQ(ppl.code, 0) << ppl.err;
  EXPECT_GE(nlohmann::json::parse(ppl.out)["kl"].get<double>(), 0);
  const Outcome inspect = run({"inspect", dir_ / "sparse", "--json"});
  EXPECT_NEAR(nlohmann::json::parse(inspect.out)["plan"]["sparsity_weight_bytes"].get<double>(), 0.5, 0.01);
  const Outcome bench = run({"bench", dir_ / "sparse", "-p", "8", "-n", "4", "-r", "1", "-o", "json"});
  EXPECT_EQ(nlohmann::json::parse(bench.out).size(), 4u) << bench.err;
  EXPECT_EQ(run({"sparsify", model(), "-o", dir_ / "dense", "--method", "dense"}).code, 0);
  const Outcome once = run({"bench", dir_ / "dense", "-p", "0", "-n", "4", "-r", "1", "-o", "json"});
  EXPECT_EQ(nlohmann::json::parse(once.out).size(), 1u) << once.err;  // not dense beside itself
  EXPECT_TRUE(
      std::regex_search(run({"--version"}).out, std::regex("larosa [0-9.]+ \\(.+\\), cpu: .*cuda: ")));
}

TEST_F(Cli, UnknownFlagsAndCommands) {
  for (const Arguments& a :
       {Arguments{"run", model(), "--no-such-flag"}, Arguments{"no-such-command"}, Arguments{},
        Arguments{"sparsify", model(), "-o", dir_ / "made", "--sparsity", "half"}, Arguments{"bench"},
        Arguments{"bench", "--config", dir_ / "config.json"}}) {
    expect_refused(a, {});
  }
  for (const char* command : {"sparsify", "run", "perplexity", "eval", "inspect", "bench", "devices"}) {
    const Outcome o = run({command, "--help"});
    EXPECT_EQ(o.code, 0);
    EXPECT_NE(o.out.find("Example:"), std::string::npos);
  }
}

TEST_F(Cli, Outputs) {
  const std::string odd = dir_ / "odd\xff";
  fs::copy(model(), odd, fs::copy_options::recursive);
  const Outcome ppl = run({"perplexity", odd, "-f", text(), "-c", "32", "--chunks", "1", "--json"});
  EXPECT_TRUE(nlohmann::json::parse(ppl.out).contains("ppl")) << ppl.err;
  const Outcome inspect = run({"inspect", model(), "--json", "--tensors"});
  EXPECT_EQ(nlohmann::json::parse(inspect.out)["tensors"].size(), 21u);
  expect_refused({"run", model(), "-f", model()}, {"directory"});
  if (!fs::exists("/dev/full")) return;
  for (const Arguments& a :
       {Arguments{"inspect", model()}, Arguments{"run", model(), "-p", "x", "-n", "100", "--ignore-eos"}}) {
    const Outcome o = run(a, {"/dev/null", RLIM_INFINITY, "/dev/full"});
    EXPECT_EQ(o.code, 1);
    EXPECT_NE(o.err.find("error: standard output"), std::string::npos) << o.err;
    EXPECT_EQ(o.err.find("decode: 99 tokens"), std::string::npos) << o.err;  // it stops where nobody reads
  }
}

}  // namespace
}  // namespace larosa
