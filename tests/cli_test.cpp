// The command as a user meets it: every kind of bad input is one line on standard error that names file and
// field, exit code 1, and nothing written; Ctrl-C leaves nothing half-made.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <thread>

#include "eval/results.h"
#include "io/files.h"
#include "io/json.h"
#include "model/random.h"
#include "model_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

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
    EXPECT_FALSE(fs::exists(dir_ / "made")) << shown;
    EXPECT_FALSE(fs::exists(dir_ / "made.partial")) << shown;
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
    fs::remove_all(dir_ / name);
    fs::copy(model(), dir_ / name, fs::copy_options::recursive);
    return dir_ / name;
  }
  static void edit_json(const std::string& path, const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json json = read_json(path);
    change(json);
    std::ofstream(path) << json;
  }
  /// Changes a safetensors header, the data stays.
  static void edit_header(const std::string& path, const std::function<void(nlohmann::json&)>& change) {
    const std::string bytes = file_bytes(path);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    nlohmann::json header = nlohmann::json::parse(bytes.substr(8, length));
    change(header);
    const std::string text = header.dump();
    length = text.size();
    std::string head(reinterpret_cast<const char*>(&length), sizeof(length));
    const size_t data = 8 + static_cast<size_t>(reinterpret_cast<const uint8_t*>(bytes.data())[0]) +
                        256 * static_cast<size_t>(reinterpret_cast<const uint8_t*>(bytes.data())[1]);
    std::ofstream(path, std::ios::binary) << head + text + bytes.substr(data);
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
  const std::string kUp = "model.layers.1.mlp.up_proj.weight";
};

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

TEST_F(Cli, DamagedShards) {
  const std::string shard = shard_of(kUp);
  fs::remove(copy("bad") + "/" + shard);
  expect_refused_model("bad", {shard});
  const auto size = fs::file_size(model() + "/" + shard);
  fs::resize_file(copy("bad") + "/" + shard, size - 100);
  expect_refused_model("bad", {shard});
  fs::resize_file(copy("bad") + "/" + shard, 5);
  expect_refused_model("bad", {shard});
  {
    std::fstream file(copy("bad") + "/" + shard, std::ios::in | std::ios::out | std::ios::binary);
    const uint64_t huge = uint64_t{1} << 40;
    file.write(reinterpret_cast<const char*>(&huge), sizeof(huge));
  }
  expect_refused_model("bad", {shard, "header"});
}

TEST_F(Cli, DamagedHeaders) {
  const std::string shard = shard_of(kUp);
  const auto damage = [&](const std::function<void(nlohmann::json&)>& change,
                          std::vector<std::string> words) {
    edit_header(copy("bad") + "/" + shard, change);
    words.push_back(shard);
    words.push_back(kUp);
    expect_refused_model("bad", words);
  };
  const auto& name = kUp;
  damage(
      [&](nlohmann::json& h) { h[name]["data_offsets"][0] = h[name]["data_offsets"][0].get<int64_t>() - 2; },
      {});
  damage(
      [&](nlohmann::json& h) { h[name]["data_offsets"][0] = h[name]["data_offsets"][0].get<int64_t>() + 2; },
      {});
  damage([&](nlohmann::json& h) { h[name]["shape"] = {int64_t{1} << 62, 8}; }, {});
  damage([&](nlohmann::json& h) { h[name]["dtype"] = "I16"; }, {"I16"});
  damage([&](nlohmann::json& h) { std::swap(h[name]["shape"][0], h[name]["shape"][1]); },
         {"(56, 48)", "(48, 56)"});
}

TEST_F(Cli, DamagedIndex) {
  const auto damage = [&](const std::function<void(nlohmann::json&)>& change, const std::string& word) {
    edit_json(copy("bad") + "/model.safetensors.index.json", change);
    expect_refused_model("bad", {"model.safetensors.index.json", word});
  };
  damage([&](nlohmann::json& j) { j["weight_map"][kUp] = "../x"; }, "../x");
  damage([&](nlohmann::json& j) { j["weight_map"][kUp] = "absent.safetensors"; }, "absent.safetensors");
}

TEST_F(Cli, NanWeights) {
  const std::string path = copy("bad") + "/" + shard_of(kUp);
  set_nan(path, kUp);
  expect_refused_model("bad", {shard_of(kUp), kUp}, {"--check-tensors"});
}

TEST_F(Cli, ImpossibleConfigs) {
  const std::map<std::string, nlohmann::json> wrong = {
      {"hidden_size", -48},
      {"hidden_size", 0},
      {"num_hidden_layers", 1e9},
      {"vocab_size", "many"},
      {"num_attention_heads", 5},
      {"num_key_value_heads", 3},
      {"rms_norm_eps", -1},
      {"rope_theta", 0},
      {"max_position_embeddings", 0},
      {"model_type", "mamba"},
      {"hidden_act", "gelu"},
      {"quantization_config", {{"bits", 4}}},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}}}};
  for (const auto& [field, value] : wrong) {
    edit_json(copy("bad") + "/config.json", [&](nlohmann::json& j) { j[field] = value; });
    expect_refused_model("bad", {"config.json", field == "num_attention_heads" ? "num_" : field});
  }
}

TEST_F(Cli, TokenizerBeyondTheModel) {
  edit_json(copy("bad") + "/tokenizer.json", [](nlohmann::json& j) { j["model"]["vocab"]["A"] = 5000; });
  expect_refused({"run", dir_ / "bad", "-p", "AAAA", "-n", "1"}, {"5000", "260"});
  expect_refused({"perplexity", dir_ / "bad", "-f", text(), "-c", "32"}, {"5000", "260"});
  expect_refused({"sparsify", dir_ / "bad", "-o", dir_ / "made", "--calib", text()}, {"5000", "260"});
}

TEST_F(Cli, MessagesAreOneLineWhateverAFileSays) {
  edit_json(copy("bad") + "/tokenizer.json",
            [](nlohmann::json& j) { j["pre_tokenizer"]["type"] = "Two\nlines\x1b[31m"; });
  expect_refused({"run", dir_ / "bad", "-p", "x"}, {"tokenizer.json", "Two lines [31m"});
}

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

/// Threads × depths × tests × readings, in all formats.
TEST_F(Cli, BenchSweeps) {
  Arguments a = {"bench",
                 "--config",
                 dir_ / "config.json",
                 "--random-weights",
                 "-t",
                 "1,2",
                 "-d",
                 "0,16",
                 "-p",
                 "8",
                 "-n",
                 "4",
                 "-r",
                 "2",
                 "-o"};
  const auto in = [&](const char* format) {
    Arguments b = a;
    b.push_back(format);
    const Outcome o = run(b);
    EXPECT_EQ(o.code, 0) << o.err;
    return o.out;
  };
  const nlohmann::json rows = nlohmann::json::parse(in("json"));
  std::map<std::string, nlohmann::json> found;
  for (const auto& row : rows) {
    for (const auto& [key, value] : row.items())
      EXPECT_TRUE(value.is_string() || value.is_number() || key == "samples_ts") << key;
    EXPECT_EQ(row["samples_ts"].size(), 2u);
    EXPECT_GT(row["avg_ts"], 0);
    if (row["method"] == "dense") {
      EXPECT_EQ(row["speedup"], 1);
    }
    if (row["n_threads"] == 1) {
      EXPECT_EQ(row["thread_speedup"], 1);
    }
    found[std::to_string(row["n_threads"].get<int>()) + row["test"].get<std::string>() +
          row["method"].get<std::string>()] = row;
  }
  EXPECT_EQ(found.size(), 16u);
  EXPECT_EQ(rows.size(), 16u);
  const nlohmann::json config = read_json(dir_ / "config.json");
  const int64_t width = config["num_key_value_heads"].get<int64_t>() * config["hidden_size"].get<int64_t>() /
                        config["num_attention_heads"].get<int64_t>();
  for (const char* method : {"dense", "larosa"}) {
    EXPECT_EQ(found[std::string("2tg4 @ d16") + method]["n_depth"], 16);
    EXPECT_EQ(found[std::string("2tg4 @ d16") + method]["bytes_per_token"].get<int64_t>() -
                  found[std::string("2tg4") + method]["bytes_per_token"].get<int64_t>(),
              16 * 2 * width * 4 * config["num_hidden_layers"].get<int64_t>());
  }
  const std::string csv = in("csv"), md = in("md");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 17);
  EXPECT_EQ(csv.rfind("version,", 0), 0u);
  EXPECT_NE(md.find("| x threads |"), std::string::npos);
  EXPECT_NE(md.find("| tg4 @ d16 |"), std::string::npos);
}

/// Every operation of every reading; the parts add up to the token.
TEST_F(Cli, BenchOperations) {
  const Arguments a = {"bench",
                       "--config",
                       dir_ / "config.json",
                       "--random-weights",
                       "-p",
                       "0",
                       "-n",
                       "4",
                       "-r",
                       "1",
                       "--ops",
                       "--backend",
                       "ref",
                       "-o"};
  const auto in = [&](const char* format) {
    Arguments b = a;
    b.push_back(format);
    const Outcome o = run(b);
    EXPECT_EQ(o.code, 0) << o.err;
    return o.out;
  };
  std::map<std::string, std::map<std::string, nlohmann::json>> found;  // method, operation
  for (const auto& row : nlohmann::json::parse(in("json"))) found[row["method"]][row["operation"]] = row;
  ASSERT_EQ(found.size(), 2u);
  for (const auto& [method, operations] : found) {
    double share = 0, bytes = 0, us = 0;
    for (const auto& [name, row] : operations) {
      for (const auto& [key, value] : row.items()) EXPECT_TRUE(value.is_string() || value.is_number()) << key;
      if (name == "token") continue;
      share += row["share"].get<double>();
      bytes += row["bytes_per_token"].get<double>();
      us += row["us_per_token"].get<double>();
    }
    EXPECT_NEAR(share, 1, 1e-9);
    EXPECT_EQ(bytes, operations.at("token")["bytes_per_token"]);
    EXPECT_NEAR(us, operations.at("token")["us_per_token"].get<double>(), 1e-6 * us);
  }
  const auto bytes = [&](const char* method, const char* operation) {
    return found[method].at(operation)["bytes_per_token"].get<double>();
  };
  for (const char* name : {"embed", "rms_norm norm_attn", "rope", "attend", "glu", "matmul head"}) {
    EXPECT_EQ(bytes("dense", name), bytes("larosa", name)) << name;
  }
  for (const std::string group : {"wq wk wv", "wo", "gate up", "down"}) {
    EXPECT_NEAR(bytes("larosa", ("sparse_matmul " + group).c_str()),
                0.5 * bytes("dense", ("matmul " + group).c_str()),
                0.03 * bytes("dense", ("matmul " + group).c_str()));
  }
  for (const char* site : {"h1", "h2", "h3", "h4"}) {
    EXPECT_GT(found["larosa"].at(std::string("topk ") + site)["us_per_call"], 0);
  }
  EXPECT_GT(bytes("larosa", "rotate adapter"), 0);
  const std::string csv = in("csv"), md = in("md");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'),
            1 + static_cast<int64_t>(found["dense"].size() + found["larosa"].size()));
  EXPECT_NE(md.find("\n| sparse_matmul gate up | "), std::string::npos);
  EXPECT_NE(md.find("larosa, 50.0 % sparse, tg4, "), std::string::npos);
}

/// Lengths × readings over different prompts, of random tokens and of a text; thresholds too.
TEST_F(Cli, BenchPrompts) {
  const Arguments how = {"-p", "0", "-n", "4,8", "-d", "4", "--prompts", "3", "-r", "2", "-t", "1", "-o"};
  const auto in = [&](Arguments a, const char* format) {
    a.insert(a.end(), how.begin(), how.end());
    a.push_back(format);
    const Outcome o = run(a);
    EXPECT_EQ(o.code, 0) << o.err;
    return o.out;
  };
  const Outcome teal = run({"sparsify", model(), "-o", dir_ / "teal", "--method", "teal", "--calib", text()});
  ASSERT_EQ(teal.code, 0) << teal.err;
  const Arguments random = {"bench", "--config", dir_ / "config.json", "--random-weights"};
  const Arguments stored = {"bench", dir_ / "teal", "-f", text()};
  for (const Arguments& a : {random, stored}) {
    std::map<std::string, int> found;
    for (const auto& row : nlohmann::json::parse(in(a, "json"))) {
      ++found[row["method"].get<std::string>() + " " + row["test"].get<std::string>()];
      EXPECT_EQ(row["n_prompts"], 3);
      const std::vector<double> rates = row["samples_ts"];
      ASSERT_EQ(rates.size(), 6u);  // prompt after prompt, then all of them again
      double mean = 0, squares = 0;
      for (size_t p = 0; p < 3; ++p) mean += (rates[p] + rates[p + 3]) / 6;
      for (size_t p = 0; p < 3; ++p) squares += std::pow((rates[p] + rates[p + 3]) / 2 - mean, 2);
      EXPECT_NEAR(row["prompt_cv"], std::sqrt(squares / 2) / mean, 1e-9);
    }
    const std::string method = a == random ? "larosa" : "teal";
    const std::map<std::string, int> wanted = {
        {"dense tg4 @ d4", 1}, {"dense tg8 @ d4", 1}, {method + " tg4 @ d4", 1}, {method + " tg8 @ d4", 1}};
    EXPECT_EQ(found, wanted);
  }
  EXPECT_NE(in(random, "md").find("| CV over prompts |"), std::string::npos);
  EXPECT_NE(in(random, "csv").find(",prompt_cv"), std::string::npos);
  std::ofstream(dir_ / "short.txt") << "once upon a time";
  const auto refused = [&](Arguments a, Arguments more, const std::vector<std::string>& words) {
    a.insert(a.end(), more.begin(), more.end());
    expect_refused(a, words);
  };
  refused(random, {"-f", text(), "--prompts", "3", "-n", "4"}, {"--file", "tokenizer"});
  refused({"bench", model()}, {"-f", text(), "-n", "4"}, {"--file", "--prompts"});
  refused({"bench", model()}, {"-f", dir_ / "short.txt", "--prompts", "3", "-p", "0", "-n", "32"},
          {"short.txt", "34"});
  refused(random, {"--prompts", "1"}, {"--prompts"});
}

/// A text is read and checked before the weights are: there are none here.
TEST_F(Cli, BenchChecksTheTextFirst) {
  const std::string bare = copy("bare");
  for (const auto& file : fs::directory_iterator(dir_ / "bare"))
    if (file.path().string().find(".safetensors") != std::string::npos) fs::remove(file);
  edit_json(bare + "/tokenizer.json", [](nlohmann::json& json) {
    json["added_tokens"].push_back({{"id", 300}, {"content", "<far>"}, {"special", true}});
  });
  std::ofstream(dir_ / "short.txt") << "once upon a time";
  std::ofstream(dir_ / "far.txt") << "once upon a time <far> in a land";
  const auto refused = [&](const std::string& file, const std::vector<std::string>& words) {
    expect_refused({"bench", bare, "-f", dir_ / file, "--prompts", "2", "-p", "0", "-n", "20"}, words);
  };
  refused("absent.txt", {"absent.txt"});
  refused("short.txt", {"short.txt", "16 tokens", "need 21"});
  refused("far.txt", {"far.txt", "token id 300", "vocabulary of 260"});
}

TEST_F(Cli, BenchRefusesListsThatAreNone) {
  const Arguments a = {"bench", "--config", dir_ / "config.json", "--random-weights", "-p", "0", "-n", "4"};
  for (const Arguments& more : {Arguments{"-t", "1,none"}, Arguments{"-t", "0"}, Arguments{"-t", "1,2000"},
                                Arguments{"-d", "-1"}, Arguments{"-d", "0,far"}, Arguments{"-n", "4,-1"}}) {
    Arguments b = a;
    b.insert(b.end(), more.begin(), more.end());
    expect_refused(b, {more[0] == "-t" ? "--threads" : more[0] == "-d" ? "--depth" : "--gen"});
  }
  Arguments b = a;
  b.insert(b.end(), {"-d", "0,1000000"});
  expect_refused(b, {"--depth 1000000", "context"});
  expect_refused({"run", model(), "-p", "x", "-t", "1,2"}, {"--threads"});
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

TEST_F(Cli, RandomWeightsAreSavedWhereNothingStands) {
  const auto save = [&](const std::string& name) {
    return Arguments{"bench", "--config", dir_ / "config.json", "--random-weights", "--save", dir_ / name};
  };
  EXPECT_EQ(run(save("slash/")).code, 0);
  EXPECT_TRUE(fs::exists(dir_ / "slash/config.json"));
  expect_refused(save("slash"), {"slash", "exists"});
  expect_refused(save("nowhere/x"), {"nowhere", "does not exist"});
  fs::create_directory(dir_ / "other.partial");  // of a sparsify that waits for its resume
  std::ofstream(dir_ / "other.partial/basis-0.safetensors") << "precious";
  expect_refused(save("other"), {"other.partial", "exists"});
  EXPECT_EQ(file_bytes(dir_ / "other.partial/basis-0.safetensors"), "precious");
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
  expect_refused(sparsify("wina", {"--bases", "separate"}), {"--bases", "wina"});
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

TEST_F(Cli, ThresholdsSayWhatTheyReached) {
  const std::string made = dir_ / "teal";
  const Outcome o = run({"sparsify", model(), "-o", made, "--method", "teal", "--calib", text()});
  ASSERT_EQ(o.code, 0) << o.err;
  const Outcome ppl = run({"perplexity", made, "-f", text(), "-c", "32"});
  EXPECT_NE(ppl.out.find("% of the weights dropped"), std::string::npos) << ppl.out;
  const auto j = nlohmann::json::parse(run({"perplexity", made, "-f", text(), "-c", "32", "--json"}).out);
  EXPECT_NEAR(j["reached_weight_sparsity"].get<double>(), 0.5, 0.02);  // its own text, 4 small windows of it
  EXPECT_EQ(j["reached_sites"].size(), 4u);
  EXPECT_NE(run({"inspect", made}).out.find("expected"), std::string::npos);
  EXPECT_EQ(run({"run", made, "-p", "hello", "-n", "4"}).code, 0);
}

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

TEST_F(Cli, QuantisedWeights) {
  for (const char* method : {"dense", "larosa"}) {
    const std::string made = dir_ / method;
    const Outcome o =
        run({"sparsify", model(), "-o", made, "--method", method, "--weights", "int4", "--calib", text()});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(run({"run", made, "-p", "hello", "-n", "4", "--check-tensors"}).code, 0);
    const auto j = nlohmann::json::parse(run({"inspect", made, "--json", "--tensors"}).out);
    EXPECT_EQ(j["plan"]["notes"]["weights"], "int4");
    std::map<std::string, nlohmann::json> tensors;
    for (const auto& t : j["tensors"]) tensors[t["name"]] = t;
    EXPECT_EQ(tensors["layers.1.up"],
              nlohmann::json({{"name", "layers.1.up"}, {"dtype", "int4"}, {"shape", {48, 56}}}));
    EXPECT_EQ(tensors["head"], nlohmann::json({{"name", "head"}, {"dtype", "int8"}, {"shape", {48, 260}}}));
    EXPECT_EQ(tensors["embed"], nlohmann::json({{"name", "embed"}, {"dtype", "int8"}, {"shape", {260, 48}}}));
    EXPECT_EQ(read_json(made + "/config.json")["larosa"]["weights"], "int4");
    const Outcome bench = run({"bench", made, "-p", "8", "-n", "4", "-r", "1", "-o", "json"});
    EXPECT_EQ(bench.code, 0) << bench.err;
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

TEST_F(Cli, AgainstAModelThatCannotBeCompared) {
  edit_json(copy("other") + "/tokenizer.json",
            [](nlohmann::json& j) { std::swap(j["model"]["vocab"]["e"], j["model"]["vocab"]["t"]); });
  expect_refused({"perplexity", model(), "-f", text(), "-c", "32", "--against", dir_ / "other"},
                 {"other", "tokenizer"});
  edit_json(copy("brief") + "/config.json", [](nlohmann::json& j) { j["max_position_embeddings"] = 16; });
  expect_refused({"perplexity", model(), "-f", text(), "-c", "32", "--against", dir_ / "brief"},
                 {"-c 32", "16"});
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

TEST_F(Cli, PlanOfAnotherModel) {
  ASSERT_EQ(run({"sparsify", model(), "-o", dir_ / "sparse", "--calib", text()}).code, 0);
  const std::string first = (fs::path(dir_ / "sparse") / "model-00001-of-00003.safetensors").string();
  std::string bytes = file_bytes(first);
  const size_t place = bytes.find("fingerprint\\\":\\\"") + 16;
  bytes[place] = bytes[place] == '0' ? '1' : '0';
  std::ofstream(first, std::ios::binary) << bytes;
  expect_refused({"run", dir_ / "sparse", "-p", "x"}, {"sparse", "another model"});
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
