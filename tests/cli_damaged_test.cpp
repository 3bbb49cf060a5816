// Damaged models: every command that loads one refuses it in one line that names file and field.
#include <cstring>
#include <map>

#include "cli_fixture.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

const std::string kUp = "model.layers.1.mlp.up_proj.weight";

/// Changes a safetensors header, the data stays.
void edit_header(const std::string& path, const std::function<void(nlohmann::json&)>& change) {
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

TEST_F(Cli, PlanOfAnotherModel) {
  ASSERT_EQ(run({"sparsify", model(), "-o", dir_ / "sparse", "--calib", text()}).code, 0);
  const std::string first = (fs::path(dir_ / "sparse") / "model-00001-of-00003.safetensors").string();
  std::string bytes = file_bytes(first);
  const size_t place = bytes.find("fingerprint\\\":\\\"") + 16;
  bytes[place] = bytes[place] == '0' ? '1' : '0';
  std::ofstream(first, std::ios::binary) << bytes;
  expect_refused({"run", dir_ / "sparse", "-p", "x"}, {"sparse", "another model"});
}

}  // namespace
}  // namespace larosa
