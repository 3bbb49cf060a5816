// larosa sweep: how methods are named, pages are made anew, grids that are refused.
#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

TEST_F(Cli, SweepsNameMethodsByTheFlagsOfSparsify) {
  const std::string name = "topk:score=magnitude,site-scale=0.8,1.2,0.8,1.2";
  const Arguments grid = {"sweep", model(),       "--methods",  name + ",topk", "--sparsity", "0.5",
                          "-f",    text(),        "-c",         "32",           "--chunks",   "2",
                          "-o",    dir_ / "grid", "--no-speed", "--ppl-share",  "0"};
  const Outcome whole = run(grid);
  EXPECT_EQ(whole.code, 0) << whole.err;
  EXPECT_EQ(std::count(whole.out.begin(), whole.out.end(), '\n'), 3) << whole.out;
  EXPECT_NE(file_bytes(dir_ / "grid/results.csv").find("\n\"" + name + "\",folded,0.5,"), std::string::npos);
  const std::string page = file_bytes(dir_ / "grid/report.html");
  fs::remove(dir_ / "grid/report.html");
  EXPECT_EQ(run({"sweep", "-o", dir_ / "grid"}).code, 0);
  EXPECT_EQ(file_bytes(dir_ / "grid/report.html"), page);
  Arguments beyond = grid;
  beyond[3] = "cats", beyond[5] = "0.9", beyond[13] = dir_ / "beyond";
  beyond.insert(beyond.end(), {"--calib", text(), "--calib-tokens", "64"});
  const Outcome refused = run(beyond);
  EXPECT_EQ(refused.code, 0) << refused.err;
  EXPECT_NE(file_bytes(dir_ / "beyond/results.csv").find("--sparsity 0.9: method cats"), std::string::npos);
  Arguments other = grid;
  other[11] = "3";
  expect_refused(other, {"grid", "chunks was 2, now 3"});
  const auto refuse = [&](const std::string& methods, const std::vector<std::string>& words) {
    expect_refused({"sweep", model(), "--methods", methods, "-f", text(), "-c", "32", "-o", dir_ / "made"},
                   words);
  };
  refuse("nosuch", {"--methods nosuch", "unknown", "topk"});
  refuse("topk,dense", {"dense is always measured"});
  refuse("topk:calib=x", {"calib is not an option of a method"});
  refuse("topk:score", {"option=value"});
  refuse("topk:score=", {"option=value"});
  refuse("topk:budget-includes-adapter=true", {"has no adapters"});
  refuse("topk:score=best", {"topk:score=best", "--score"});
  refuse("topk:pool=off", {"topk:pool=off", "does not use it"});
  refuse("larosa", {"--calib", "larosa"});
  expect_refused({"sweep", "-o", dir_ / "nothing"}, {"nothing", "sweep.json"});
  expect_refused({"sweep", model(), "--methods", "topk"}, {"-f", "text"});
}

}  // namespace
}  // namespace larosa
