// Checkpoints against their config: every disagreement is one Error that names file and tensor.
#include "model/weights.h"

#include "base/error.h"
#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

using nlohmann::json;

class Weights : public testing::Test {
 protected:
  /// Copies a tiny model and changes its config.
  void copy_with(const std::string& model, const std::string& changes) {
    const std::filesystem::path from = source_path("tests/golden/models/" + model);
    using std::filesystem::copy_options;
    std::filesystem::copy(from, dir_ / "", copy_options::overwrite_existing | copy_options::recursive);
    json config = json::parse(file_bytes((from / "config.json").string()));
    config.update(json::parse(changes));
    std::ofstream(dir_ / "config.json") << config.dump();
  }

  /// Replaces text of the weight file's header by text of the same length.
  void patch_header(const std::string& from, const std::string& to) {
    ASSERT_EQ(from.size(), to.size());
    std::string bytes = file_bytes(dir_ / "model.safetensors");
    const size_t place = bytes.find(from);
    ASSERT_NE(place, std::string::npos) << from;
    bytes.replace(place, from.size(), to);
    std::ofstream(dir_ / "model.safetensors", std::ios::binary) << bytes;
  }

  void expect_message(const std::vector<std::string>& words) {
    std::string message;
    try {
      load_model(dir_ / "");
    } catch (const Error& e) {
      message = e.what();
    }
    EXPECT_FALSE(message.empty());
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string& word : words)
      EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks \"" << word << "\"";
  }

  TemporaryDir dir_;
};

TEST_F(Weights, EveryFamilyLoads) {
  for (const std::string& dir : tiny_models()) {
    const Checkpoint checkpoint = Checkpoint::open(dir);
    const ModelConfig config = load_config(dir);
    int64_t bytes = load_outer(checkpoint, config).embed.bytes();
    for (int64_t l = 0; l < config.layers; ++l) {
      const LayerWeights w = load_layer(checkpoint, config, l);
      for (const Projection p : kProjections) {
        EXPECT_EQ(w[p].layout, Layout::rows);
        EXPECT_EQ(w[p].in, projection_in(config, p)) << dir;
        EXPECT_EQ(w[p].out, projection_out(config, p)) << dir;
        bytes += w[p].bytes();
      }
      EXPECT_EQ(w[Projection::wq].bias != nullptr, config.bias_qkv) << dir;
      EXPECT_EQ(w[Projection::wo].bias != nullptr, config.bias_o) << dir;
      EXPECT_EQ(w[Projection::down].bias, nullptr) << dir;
      EXPECT_EQ(w.norm_q != nullptr, config.qk_norm) << dir;
    }
    EXPECT_LT(bytes, checkpoint.bytes()) << dir;
    checkpoint.check_finite();
  }
}

TEST_F(Weights, ShapesFollowTheConfig) {
  copy_with("tinyllama-bf16", R"({"num_hidden_layers":3})");
  expect_message({"model.safetensors", "layers.2", "absent"});
  copy_with("tinyllama-bf16", R"({"num_hidden_layers":1})");
  expect_message({"model.safetensors", "layers.1", "num_hidden_layers is 1"});
  copy_with("tinyllama-bf16", R"({"intermediate_size":57})");
  expect_message({"model.safetensors", "gate_proj", "(56, 48)", "(57, 48)"});
  copy_with("tinyllama-bf16", R"({"vocab_size":129})");
  expect_message({"model.safetensors", "embed_tokens", "(128, 48)", "(129, 48)"});
  copy_with("tinyllama-bf16", R"({"num_key_value_heads":2})");
  expect_message({"model.safetensors", "k_proj", "(12, 48)", "(24, 48)"});
}

TEST_F(Weights, BiasesAndNormsFollowTheConfig) {
  copy_with("tinyllama-bf16", R"({"attention_bias":true})");
  expect_message({"model.safetensors", "q_proj.bias", "absent"});
  copy_with("llama-biases-f16", R"({"attention_bias":false})");
  expect_message({"model.safetensors", "q_proj.bias", "present"});
  copy_with("qwen3-bf16", R"({"model_type":"llama","architectures":["LlamaForCausalLM"]})");
  expect_message({"model.safetensors", "q_norm", "present"});
}

TEST_F(Weights, TiedWinsOverAnOwnHead) {
  copy_with("tinyllama-bf16", R"({"tie_word_embeddings":true})");
  const Model model = load_model(dir_ / "");
  EXPECT_EQ(model.outer.head.data, model.outer.embed.data);
}

TEST_F(Weights, UntiedNeedsAnOwnHead) {
  copy_with("smollm2-bf16", R"({"tie_word_embeddings":false})");
  expect_message({"model.safetensors", "lm_head.weight", "absent"});
}

TEST_F(Weights, OtherElementTypesAreRefused) {
  const std::string name = R"("model.layers.1.mlp.up_proj.weight":{"dtype":)";
  copy_with("llama2-f16", "{}");
  patch_header(name + R"("F16")", name + R"("I16")");
  expect_message({"model.safetensors", "layers.1.mlp.up_proj.weight", "dtype I16", "not supported"});
  // A vector may be float64, a projection may not.
  const std::string path = dir_ / "wide.safetensors";
  const std::vector<double> zeros(48 * 128);
  SafetensorsWriter writer(path, {{"model.embed_tokens.weight", DType::f64, {128, 48}}}, {});
  writer.write("model.embed_tokens.weight", 0, zeros.data(), 48 * 128 * 8);
  writer.finish();
  try {
    load_outer(Checkpoint::open_file(path), load_config(dir_ / ""));
    FAIL() << "float64 was accepted";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("embed_tokens.weight: dtype F64"), std::string::npos) << e.what();
  }
}

TEST_F(Weights, AShardThatIsCutShortIsRefused) {
  copy_with("llama3-bf16-shards", "{}");
  const std::string shard = dir_ / "model-00002-of-00002.safetensors";
  std::filesystem::resize_file(shard, std::filesystem::file_size(shard) - 2);
  expect_message({"model-00002-of-00002.safetensors", "data_offsets"});
  std::filesystem::remove(shard);
  expect_message({"index.json", "model-00002-of-00002.safetensors", "absent"});
}

}  // namespace
}  // namespace larosa
