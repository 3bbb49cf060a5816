// What the tests of the command share: a small model, the command run in a process of its own, and what a
// refusal looks like. Every kind of bad input is one line on standard error that names file and field, exit
// code 1, and nothing written. Each test has a temporary directory to itself.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "io/json.h"
#include "model/random.h"
#include "model_fixture.h"

namespace larosa {

struct Outcome {
  int code = -1;
  std::string out, err;
};

using Arguments = std::vector<std::string>;

struct Start {
  std::string input = "/dev/null";
  rlim_t most_file_bytes = RLIM_INFINITY;
  std::string output = {};  // where standard output goes; empty: to Outcome::out
};

class Cli : public testing::Test {
 protected:
  void SetUp() override {
    nlohmann::json config = read_json(source_path("tests/golden/models/llama3-bf16-shards/config.json"));
    config["vocab_size"] = 260;
    std::ofstream(dir_ / "config.json") << config;
    ThreadPool pool(1);
    write_random_checkpoint(dir_ / "config.json", model(), {DType::bf16}, 20000, pool, {});
    std::ofstream(dir_ / "text.txt") << file_bytes(source_path("text/demo.valid.txt")).substr(0, 4000);
  }
  std::string model() const { return dir_ / "model"; }
  std::string text() const { return dir_ / "text.txt"; }

  pid_t begin(const Arguments& arguments, const Start& start = {}) {
    const pid_t child = fork();
    if (child != 0) return child;
    const auto attach = [](const std::string& path, int flags, int to) {
      const int fd = open(path.c_str(), flags, 0600);
      if (fd < 0 || dup2(fd, to) < 0) _exit(99);
    };
    attach(start.input, O_RDONLY, 0);
    attach(start.output.empty() ? dir_ / "out.log" : start.output, O_WRONLY | O_CREAT | O_TRUNC, 1);
    attach(dir_ / "err.log", O_WRONLY | O_CREAT | O_TRUNC, 2);
    if (start.most_file_bytes != RLIM_INFINITY) {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{start.most_file_bytes, start.most_file_bytes};
      setrlimit(RLIMIT_FSIZE, &limit);
    }
    std::vector<char*> argv = {const_cast<char*>("larosa")};
    for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    execv(LAROSA_BINARY, argv.data());
    _exit(98);
  }
  Outcome end(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    Outcome outcome;
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    outcome.out = file_bytes(dir_ / "out.log");
    outcome.err = file_bytes(dir_ / "err.log");
    return outcome;
  }
  Outcome run(const Arguments& arguments, const Start& start = {}) { return end(begin(arguments, start)); }

  /// Exit code 1, nothing on standard output, and one line "error: …" (behind log lines) with all `words`.
  void expect_refused(const Arguments& arguments, const std::vector<std::string>& words,
                      const Start& start = {}) {
    const Outcome o = run(arguments, start);
    std::string shown;
    for (const std::string& a : arguments) shown += a + " ";
    EXPECT_EQ(o.code, 1) << shown << o.err;
    EXPECT_EQ(o.out, "") << shown;
    const size_t place = o.err.rfind("error: ");
    ASSERT_NE(place, std::string::npos) << shown << o.err;
    const std::string line = o.err.substr(place);
    EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << line;
    for (const std::string& word : words)
      EXPECT_NE(line.find(word), std::string::npos) << word << " in " << line;
    EXPECT_FALSE(std::filesystem::exists(dir_ / "made")) << shown;
    EXPECT_FALSE(std::filesystem::exists(dir_ / "made.partial")) << shown;
  }
  /// Every command that loads a model refuses it.
  void expect_refused_model(const std::string& name, const std::vector<std::string>& words,
                            const Arguments& more = {}) {
    for (Arguments a :
         {Arguments{"run", dir_ / name, "-p", "hello", "-n", "1"},
          Arguments{"perplexity", dir_ / name, "-f", text(), "-c", "32"}, Arguments{"inspect", dir_ / name},
          Arguments{"sparsify", dir_ / name, "-o", dir_ / "made", "--calib", text()}}) {
      a.insert(a.end(), more.begin(), more.end());
      expect_refused(a, words);
    }
  }
  /// A copy of the model to damage.
  std::string copy(const std::string& name) {
    std::filesystem::remove_all(dir_ / name);
    std::filesystem::copy(model(), dir_ / name, std::filesystem::copy_options::recursive);
    return dir_ / name;
  }
  static void edit_json(const std::string& path, const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json json = read_json(path);
    change(json);
    std::ofstream(path) << json;
  }
  /// Makes one element of a bf16 tensor a NaN.
  static void set_nan(const std::string& path, const std::string& tensor) {
    std::string bytes = file_bytes(path);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    const auto header = nlohmann::json::parse(bytes.substr(8, length));
    const size_t place = 8 + length + header[tensor]["data_offsets"][0].get<size_t>() + 20;
    bytes[place] = '\xc0', bytes[place + 1] = '\x7f';
    std::ofstream(path, std::ios::binary) << bytes;
  }
  std::string shard_of(const std::string& tensor) const {
    return read_json(model() + "/model.safetensors.index.json")["weight_map"][tensor];
  }

  TemporaryDir dir_;
};

}  // namespace larosa
