// larosa bench: its tables and what they add up to, random weights and where they are saved.
#include <cmath>
#include <map>

#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

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

}  // namespace
}  // namespace larosa
