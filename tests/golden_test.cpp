// Dense logits and greedy continuations against transformers in float32 (files of dev/golden.py).
#include <nlohmann/json.hpp>

#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

/// Largest |found − expected| over the root mean square of the expected logits.
constexpr double kTolerance = 2e-3;

double relative_error(std::span<const float> found, std::span<const float> expected) {
  double worst = 0, squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(double{found[i]} - double{expected[i]});
    worst = difference <= worst ? worst : difference;  // keeps a NaN
    squares += double{expected[i]} * double{expected[i]};
  }
  return worst / std::sqrt(squares / static_cast<double>(expected.size()));
}

struct TinyGolden {
  std::vector<int32_t> prompt;
  std::vector<float> logits;  // (prompt, vocab)
};

TinyGolden read_tiny(const std::string& dir, int64_t vocab) {
  const Checkpoint file = Checkpoint::open_file(dir + "/golden.safetensors");
  TinyGolden golden;
  golden.prompt = nlohmann::json::parse(file.metadata().at("prompt")).get<std::vector<int32_t>>();
  const int64_t shape[] = {static_cast<int64_t>(golden.prompt.size()), vocab};
  const Tensor logits = file.get("logits", shape);
  for (int64_t i = 0; i < logits.elements(); ++i)
    golden.logits.push_back(load_element(logits.data, logits.dtype, i));
  return golden;
}

class Golden : public testing::Test {
 protected:
  /// As one prompt, in pieces, and token by token.
  void expect_tiny_models(Backend& backend) {
    auto dirs = tiny_models();
    ASSERT_GE(dirs.size(), 12u);
    const auto sparse = tiny_models("sparse");
    ASSERT_EQ(sparse.size(), 6u);
    dirs.insert(dirs.end(), sparse.begin(), sparse.end());
    for (const std::string& dir : dirs) {
      const Model model = load_model(dir);
      const TinyGolden golden = read_tiny(dir, model.config.vocab);
      for (const size_t chunk : {golden.prompt.size(), size_t{7}, size_t{1}}) {
        const auto logits = all_logits(model, backend, golden.prompt, chunk);
        EXPECT_LT(relative_error(logits, golden.logits), kTolerance) << dir << ", " << chunk << " at once";
      }
    }
  }

  /// The prompt and its continuation at once: logits of the recorded positions, and every greedy choice.
  void expect_trained_model(const std::string& dir, const std::string& name) {
    const nlohmann::json golden = read_json(source_path("tests/golden/" + name + ".json"));
    const Model model = load_model(dir);
    const auto vocab = static_cast<size_t>(model.config.vocab);
    const auto prompt = golden["prompt"].get<std::vector<int32_t>>();
    const auto greedy = golden["greedy"].get<std::vector<int32_t>>();
    ASSERT_EQ(greedy.size(), 200u);
    std::vector<int32_t> tokens = prompt;
    tokens.insert(tokens.end(), greedy.begin(), greedy.end());
    const auto logits = all_logits(model, *backend_, tokens, tokens.size());
    ASSERT_EQ(golden["rows"].size(), 3u);
    for (const auto& row : golden["rows"]) {
      const float* x = &logits[row["position"].get<size_t>() * vocab];
      const double rms = row["rms"].get<double>();
      double sum = 0;
      for (size_t i = 0; i < vocab; ++i) sum += std::exp(double{x[i]});
      EXPECT_NEAR(std::log(sum), row["logsumexp"].get<double>(), kTolerance * rms);
      const auto ids = row["ids"].get<std::vector<size_t>>();
      const auto expected = row["logits"].get<std::vector<double>>();
      for (size_t i = 0; i < ids.size(); ++i) EXPECT_NEAR(double{x[ids[i]]}, expected[i], kTolerance * rms);
    }
    EXPECT_EQ(continuation(model, prompt, greedy.size()), greedy) << dir;
  }

  /// The likeliest token, `count` times: the prompt at once, then token by token.
  std::vector<int32_t> continuation(const Model& model, const std::vector<int32_t>& prompt, size_t count) {
    const ModelConfig& c = model.config;
    Decoder decoder(c, *backend_);
    const auto cache = backend_->make_kv_cache(
        {c.layers, c.kv_heads, c.head_dim, static_cast<int64_t>(prompt.size() + count), DType::f32});
    std::vector<int32_t> step = prompt, chosen;
    std::vector<float> hidden(prompt.size() * static_cast<size_t>(c.dim)),
        logits(static_cast<size_t>(c.vocab));
    int64_t pos = 0;
    while (chosen.size() < count) {
      const Mat h(hidden.data(), static_cast<int64_t>(step.size()), c.dim);
      decoder.forward(model, step, *cache, pos, Pass{}, h);
      decoder.logits(model, h.slice(h.rows - 1, 1), Mat(logits.data(), 1, c.vocab));
      pos += h.rows;
      const auto best = std::max_element(logits.begin(), logits.end());
      step = {static_cast<int32_t>(best - logits.begin())};
      chosen.push_back(step[0]);
    }
    return chosen;
  }

  /// A model of the data folder, or nothing (the test is then skipped).
  std::string data_model(const std::string& name) {
    const char* data = std::getenv("LAROSA_TEST_DATA");
    return data ? std::string(data) + "/models/" + name : "";
  }

  ThreadPool pool_{2};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
};

TEST_F(Golden, TinyModelsOnCpu) {
  expect_tiny_models(*backend_);
}

TEST_F(Golden, TinyModelsOnRef) {
  expect_tiny_models(*make_ref_backend());
}

TEST_F(Golden, DemoModel) {
  expect_trained_model(demo_model(), "demo-7m");
}

TEST_F(Golden, Stories) {
  const std::string dir = data_model("stories260k");
  if (dir.empty()) GTEST_SKIP() << "LAROSA_TEST_DATA is not set: stories260k is not compared";
  expect_trained_model(dir, "stories260k");
}

TEST_F(Golden, Mix) {
  const std::string dir = data_model("mix-88m");
  if (dir.empty()) GTEST_SKIP() << "LAROSA_TEST_DATA is not set: mix-88m is not compared";
  expect_trained_model(dir, "mix-88m");
}

}  // namespace
}  // namespace larosa
