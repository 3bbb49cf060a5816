// config.json: what each family means, and that everything else is refused by file and field.
#include "model/config.h"

#include <random>

#include "base/error.h"
#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

using nlohmann::json;

json base(const std::string& type = "llama") {
  return {{"model_type", type},       {"hidden_size", 64},
          {"intermediate_size", 128}, {"num_hidden_layers", 4},
          {"num_attention_heads", 4}, {"num_key_value_heads", 2},
          {"vocab_size", 100},        {"rms_norm_eps", 1e-5},
          {"hidden_act", "silu"},     {"max_position_embeddings", 128}};
}

json changed(const std::string& type, const std::string& changes) {
  json config = base(type);
  config.update(json::parse(changes));
  return config;
}

std::string message_of(const json& config) {
  try {
    parse_config(config, "c.json");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Config, Defaults) {
  const ModelConfig c = parse_config(base(), "c.json");
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.bos, std::vector<int32_t>{1});
  EXPECT_EQ(c.eos, std::vector<int32_t>{2});
  EXPECT_EQ(c.rope_theta, 10000);
  EXPECT_FALSE(c.tied || c.bias_qkv || c.bias_o || c.qk_norm || c.rope_scaling || c.window);
  json without = base();
  without.erase("num_key_value_heads");
  EXPECT_EQ(parse_config(without, "c.json").kv_heads, 4);
}

TEST(Config, Families) {
  const auto parse = [](const std::string& type, const std::string& changes) {
    return parse_config(changed(type, changes), "c.json");
  };
  EXPECT_EQ(parse("mistral", "{}").window, 4096);
  EXPECT_EQ(parse("mistral", R"({"sliding_window":null})").window, 0);
  EXPECT_EQ(parse("mistral", R"({"sliding_window":8})").window_of(0), 8);
  EXPECT_TRUE(parse("qwen2", "{}").bias_qkv);
  EXPECT_FALSE(parse("qwen2", "{}").bias_o);
  EXPECT_EQ(parse("qwen2", R"({"sliding_window":8,"use_sliding_window":false})").window, 0);
  const ModelConfig windowed =
      parse("qwen2", R"({"sliding_window":8,"use_sliding_window":true,"max_window_layers":3})");
  EXPECT_EQ(windowed.window_of(2), 0);
  EXPECT_EQ(windowed.window_of(3), 8);
  EXPECT_TRUE(parse("qwen3", "{}").qk_norm);
  EXPECT_EQ(parse("qwen3", "{}").head_dim, 128);
  EXPECT_TRUE(parse("llama", R"({"attention_bias":true})").bias_o);
  EXPECT_EQ(parse("llama", R"({"architectures":["LarosaForCausalLM"],"larosa":{"version":1}})").layers, 4);
  EXPECT_EQ(parse("llama", R"({"eos_token_id":[3,4]})").eos, (std::vector<int32_t>{3, 4}));
}

TEST(Config, RopeScalingInAllItsSpellings) {
  const std::string numbers =
      R"("factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":64)";
  for (const std::string& spelling :
       {R"({"rope_theta":500,"rope_scaling":{"type":"llama3",)" + numbers + "}}",
        R"({"rope_theta":500,"rope_scaling":{"rope_type":"llama3",)" + numbers + "}}",
        R"({"rope_parameters":{"rope_theta":500,"rope_type":"llama3",)" + numbers + "}}"}) {
    const ModelConfig c = parse_config(changed("llama", spelling), "c.json");
    EXPECT_EQ(c.rope_theta, 500) << spelling;
    ASSERT_TRUE(c.rope_scaling) << spelling;
    const auto f = c.inv_freq();
    ASSERT_EQ(f.size(), 8u);
    EXPECT_FLOAT_EQ(f[0], 1.0f);                                             // a short wave is kept
    EXPECT_FLOAT_EQ(f[7], static_cast<float>(std::pow(500, -7.0 / 8) / 8));  // a long one is slowed
  }
}

struct Mutation {
  const char* type;
  const char* changes;
  std::vector<std::string> words;
};

TEST(Config, TrainedSparsity) {
  const auto activation = [](const char* type, const char* changes) {
    return parse_config(changed(type, changes), "c.json").activation;
  };
  EXPECT_EQ(activation("llama", "{}"), Activation{});
  EXPECT_EQ(activation("llama", R"({"hidden_act":"relu"})"), (Activation{Activation::relu, 0}));
  EXPECT_EQ(activation("qwen3", R"({"hidden_act":"relu2"})"), (Activation{Activation::relu2, 0}));
  EXPECT_EQ(activation("sparsellama", R"({"hidden_act":"fatrelu","hidden_act_param":0.01})"),
            (Activation{Activation::relu, 0.01f}));
  EXPECT_EQ(activation("bamboo", R"({"hidden_act":"relu"})"), (Activation{Activation::drelu, 0}));
  EXPECT_EQ(parse_config(changed("qwen2", R"({"sparse_ratio":-1})"), "c.json").sparse_ratio, 0);
  const ModelConfig q = parse_config(changed("qwen2", R"({"sparse_ratio":0.4})"), "c.json");
  EXPECT_EQ(q.trained_keep(10), 6);
  EXPECT_EQ(q.trained_keep(11), 6);  // rounded down
  EXPECT_FALSE(q.sparse_rescale);
  const char* rescaled = R"({"sparse_ratio":0.4,"sparse_rescale":true})";
  EXPECT_TRUE(parse_config(changed("qwen2", rescaled), "c.json").sparse_rescale);
}

TEST(Config, RefusesWhatItCannotRun) {
  const std::vector<Mutation> cases = {
      {"phi3", "{}", {"model_type", "phi3", "llama, mistral, qwen2, qwen3"}},
      {"llama", R"({"model_type":7})", {"model_type", "string"}},
      {"llama", R"({"model_type":null})", {"model_type", "absent"}},
      {"llama", R"({"architectures":["LlamaForSequenceClassification"]})", {"architectures"}},
      {"llama", R"({"architectures":"LlamaForCausalLM"})", {"architectures"}},
      {"llama", R"({"hidden_size":null})", {"hidden_size", "absent"}},
      {"llama", R"({"hidden_size":"64"})", {"hidden_size", "integer"}},
      {"llama", R"({"hidden_size":64.5})", {"hidden_size", "64.5"}},
      {"llama", R"({"hidden_size":0})", {"hidden_size", "0"}},
      {"llama", R"({"hidden_size":66})", {"hidden_size", "num_attention_heads"}},
      {"llama", R"({"hidden_size":18446744073709551615})", {"hidden_size"}},
      {"llama", R"({"num_hidden_layers":-1})", {"num_hidden_layers", "-1"}},
      {"llama", R"({"num_hidden_layers":1025})", {"num_hidden_layers", "1025"}},
      {"llama", R"({"num_attention_heads":0})", {"num_attention_heads"}},
      {"llama", R"({"num_key_value_heads":3})", {"num_key_value_heads"}},
      {"llama", R"({"num_key_value_heads":0})", {"num_key_value_heads"}},
      {"llama", R"({"intermediate_size":[]})", {"intermediate_size"}},
      {"llama", R"({"vocab_size":0})", {"vocab_size"}},
      {"llama", R"({"head_dim":15})", {"head_dim", "even"}},
      {"llama", R"({"head_dim":-16})", {"head_dim"}},
      {"llama", R"({"max_position_embeddings":0})", {"max_position_embeddings"}},
      {"llama", R"({"rms_norm_eps":0})", {"rms_norm_eps"}},
      {"llama", R"({"rms_norm_eps":0.1})", {"rms_norm_eps"}},
      {"llama", R"({"rms_norm_eps":"1e-5"})", {"rms_norm_eps"}},
      {"llama", R"({"rope_theta":0})", {"rope_theta"}},
      {"llama", R"({"rope_theta":-1})", {"rope_theta"}},
      {"llama", R"({"rope_scaling":{"type":"linear","factor":2}})", {"rope_scaling.type", "linear"}},
      {"llama",
       R"({"rope_scaling":{"rope_type":"dynamic","factor":2}})",
       {"rope_scaling.rope_type", "dynamic"}},
      {"llama", R"({"rope_scaling":{"rope_type":"yarn","factor":2}})", {"rope_scaling.rope_type", "yarn"}},
      {"llama", R"({"rope_parameters":{"rope_type":"longrope"}})", {"rope_parameters.rope_type", "longrope"}},
      {"llama", R"({"rope_scaling":{"factor":2}})", {"rope_scaling.factor"}},
      {"llama", R"({"rope_scaling":{"rope_type":"llama3"}})", {"rope_scaling.factor", "absent"}},
      {"llama", R"({"rope_scaling":[]})", {"rope_scaling", "object"}},
      {"llama", R"({"rope_parameters":{"partial_rotary_factor":0.5}})", {"partial_rotary_factor"}},
      {"llama", R"({"partial_rotary_factor":0.5})", {"partial_rotary_factor"}},
      {"llama", R"({"hidden_act":"gelu"})", {"hidden_act", "gelu"}},
      {"llama", R"({"hidden_act":"fatrelu"})", {"hidden_act_param", "absent"}},
      {"sparsellama", R"({"hidden_act":"fatrelu","hidden_act_param":-1})", {"hidden_act_param", "-1"}},
      {"bamboo", R"({"hidden_act":"silu"})", {"hidden_act", "relu"}},
      {"qwen2", R"({"sparse_ratio":1})", {"sparse_ratio"}},
      {"qwen2", R"({"sparse_ratio":"half"})", {"sparse_ratio"}},
      {"qwen2", R"({"sparse_rescale":true})", {"sparse_rescale", "sparse_ratio"}},
      {"qwen2", R"({"sparse_ratio":0.4,"sparse_rescale":1})", {"sparse_rescale", "1"}},
      {"llama", R"({"mlp_bias":true})", {"mlp_bias"}},
      {"llama", R"({"attention_bias":"yes"})", {"attention_bias", "true or false"}},
      {"llama", R"({"tie_word_embeddings":1})", {"tie_word_embeddings"}},
      {"llama", R"({"quantization_config":{"bits":4}})", {"quantization_config"}},
      {"llama", R"({"num_local_experts":8})", {"num_local_experts"}},
      {"llama", R"({"layer_types":["full_attention"]})", {"layer_types"}},
      {"llama", R"({"bos_token_id":100})", {"bos_token_id", "99"}},
      {"llama", R"({"eos_token_id":[2,-1]})", {"eos_token_id"}},
      {"llama", R"({"eos_token_id":"2"})", {"eos_token_id"}},
      {"mistral", R"({"sliding_window":0})", {"sliding_window"}},
      {"mistral", R"({"attention_bias":true})", {"attention_bias"}},
      {"qwen2", R"({"use_sliding_window":true,"sliding_window":-4})", {"sliding_window"}},
      {"qwen3",
       R"({"layer_types":["full_attention","full_attention","sliding_attention","full_attention"]})",
       {"layer_types", "layer 2"}},
  };
  for (const Mutation& bad : cases) {
    const std::string message = message_of(changed(bad.type, bad.changes));
    EXPECT_EQ(message.rfind("c.json: ", 0), 0u) << bad.changes << ": " << message;
    for (const std::string& word : bad.words)
      EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks \"" << word << "\"";
  }
  EXPECT_NE(message_of(json::array()), "");
}

class ConfigFiles : public testing::Test {
 protected:
  void write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name, std::ios::binary) << text;
  }
  void expect_message(const std::vector<std::string>& words) {
    std::string message;
    try {
      load_config(dir_ / "");
    } catch (const Error& e) {
      message = e.what();
    }
    for (const std::string& word : words)
      EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks \"" << word << "\"";
  }
  TemporaryDir dir_;
};

TEST_F(ConfigFiles, DamagedConfigFiles) {
  expect_message({"config.json", "No such file"});
  write("config.json", "");
  expect_message({"config.json", "empty"});
  write("config.json", "{\"a\":1,\"a\":2}");
  expect_message({"config.json", "\"a\"", "twice"});
  write("config.json", "{\"hidden_size\":");
  expect_message({"config.json", "malformed"});
  write("config.json", std::string(100000, '['));
  expect_message({"config.json", "nested deeper"});
  write("config.json", "{}" + std::string(1 << 22, ' '));
  expect_message({"config.json", "limit"});
}

TEST_F(ConfigFiles, GenerationConfigAddsEndTokens) {
  write("config.json", base().dump());
  write("generation_config.json", R"({"eos_token_id":[7,2]})");
  EXPECT_EQ(load_config(dir_ / "").eos, (std::vector<int32_t>{2, 7}));
  write("generation_config.json", R"({"eos_token_id":100})");
  expect_message({"generation_config.json", "eos_token_id", "99"});
}

/// Any bytes: a config or an Error, nothing else.
TEST_F(ConfigFiles, RandomDamageIsHarmless) {
  const std::string valid = changed("qwen2", R"({"eos_token_id":[1,2],"rope_scaling":null})").dump();
  std::mt19937 engine(1);
  int parsed = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = valid;
    for (auto n = 1 + engine() % 3; n > 0; --n) {
      const size_t place = engine() % text.size();
      if (engine() % 2)
        text[place] = "0123456789[]{},:\"-e.n"[engine() % 21];
      else
        text.erase(place, 1 + engine() % 4);
    }
    try {
      const ModelConfig c = parse_config(parse_json(text, "c.json"), "c.json");
      EXPECT_GT(layer_weights(c), 0);
      EXPECT_EQ(c.inv_freq().size(), static_cast<size_t>(c.head_dim / 2));
      ++parsed;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).rfind("c.json: ", 0), 0u) << e.what();
      ++refused;
    }
  }
  EXPECT_GT(parsed, 100);
  EXPECT_GT(refused, 1000);
}

TEST(SharedConfigs, ParseOrAreRefusedForTheirReason) {
  const char* data = std::getenv("LAROSA_TEST_DATA");
  if (!data) GTEST_SKIP() << "LAROSA_TEST_DATA is not set: the collected configs are not read";
  int parsed = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(std::string(data) + "/configs")) {
    const std::string path = entry.path().string();
    const bool config =
        entry.path().filename() == "config.json" || path.find("/presets/") != std::string::npos;
    if (!entry.is_regular_file() || !config) continue;
    std::string message;
    try {
      parse_config(json::parse(file_bytes(path)), path);
      ++parsed;
    } catch (const Error& e) {
      message = e.what();
    }
    const bool phi = path.find("phi-4") != std::string::npos;
    const bool quantised = path.find("llama-3.2-1b-finetune") != std::string::npos;
    if (phi)
      EXPECT_NE(message.find("model_type"), std::string::npos) << message;
    else if (quantised)
      EXPECT_NE(message.find("quantization_config"), std::string::npos) << message;
    else
      EXPECT_EQ(message, "");
  }
  EXPECT_GT(parsed, 10);
}

}  // namespace
}  // namespace larosa
