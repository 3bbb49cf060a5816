// Which predictions count under each protocol, against sums made here from the logits of all positions.
#include "eval/perplexity.h"

#include "base/error.h"
#include "model_fixture.h"

namespace larosa {
namespace {

class Perplexity : public testing::Test {
 protected:
  PerplexityResult measure(std::span<const int32_t> tokens, const PerplexityOptions& options,
                           const Model* reference = nullptr) {
    return perplexity(model_, reference, *backend_, pool_, tokens, options,
                      [](const PerplexityResult&, int64_t) {});
  }

  /// −log p of window[i] given what stands before it in the window, for i in [first, size).
  std::vector<double> losses(const std::vector<int32_t>& window, size_t first) {
    const auto vocab = static_cast<size_t>(model_.config.vocab);
    const auto logits = all_logits(model_, *backend_, window, window.size());
    std::vector<double> found;
    for (size_t i = first; i < window.size(); ++i) {
      const float* row = &logits[(i - 1) * vocab];
      double sum = 0;
      for (size_t v = 0; v < vocab; ++v) sum += std::exp(static_cast<double>(row[v]));
      found.push_back(std::log(sum) - static_cast<double>(row[window[i]]));
    }
    return found;
  }
  std::vector<int32_t> part(size_t begin, size_t end) const {
    return {tokens_.begin() + static_cast<std::ptrdiff_t>(begin),
            tokens_.begin() + static_cast<std::ptrdiff_t>(end)};
  }
  static void expect_mean(const PerplexityResult& found, const std::vector<double>& expected) {
    double sum = 0, squares = 0;
    for (double x : expected) sum += x, squares += x * x;
    const double n = static_cast<double>(expected.size()), mean = sum / n;
    EXPECT_EQ(found.predictions, static_cast<int64_t>(expected.size()));
    EXPECT_NEAR(found.nll.value, mean, 1e-5);
    const double variance = n > 1 ? (squares / n - mean * mean) / (n - 1) : 0;
    EXPECT_NEAR(found.nll.error, std::sqrt(variance), 1e-5);
  }
  static void append(std::vector<double>& all, const std::vector<double>& more) {
    all.insert(all.end(), more.begin(), more.end());
  }

  ThreadPool pool_{2};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
  Model model_ = load_model(demo_model());
  Tokenizer tokenizer_ = Tokenizer::load(demo_model());
  std::string text_ = file_bytes(source_path("text/demo.valid.txt")).substr(0, 1200);
  std::vector<int32_t> tokens_ = tokenizer_.encode(text_, false);
};

TEST_F(Perplexity, RawCountsEveryPredictionOfWholeWindows) {
  std::vector<double> expected;
  ASSERT_GT(tokens_.size(), 150u);
  tokens_.resize(150);
  for (size_t w = 0; w < 3; ++w) append(expected, losses(part(40 * w, 40 * (w + 1)), 1));
  PerplexityOptions options;
  options.context = 40;
  expect_mean(measure(tokens_, options), expected);
  options.most_windows = 1;
  expect_mean(measure(tokens_, options), losses(part(0, 40), 1));
}

TEST_F(Perplexity, StridesScoreEveryTokenOnce) {
  tokens_.resize(100);
  PerplexityOptions options;
  options.context = 40, options.stride = 16, options.last_window = true;
  std::vector<double> expected = losses(part(0, 40), 1);
  for (size_t begin = 16; begin <= 48; begin += 16) append(expected, losses(part(begin, begin + 40), 24));
  append(expected, losses(part(64, 100), 24));
  EXPECT_EQ(expected.size(), 99u);
  expect_mean(measure(tokens_, options), expected);
  options.stride = 41;
  EXPECT_THROW(measure(tokens_, options), Error);
}

TEST_F(Perplexity, TheLastWindowMayBeShort) {
  PerplexityOptions options;
  options.context = 40, options.last_window = true;
  tokens_.resize(50);
  std::vector<double> expected = losses(part(0, 40), 1);
  append(expected, losses(part(40, 50), 1));
  expect_mean(measure(tokens_, options), expected);
  tokens_.resize(41);  // one token alone predicts nothing
  expect_mean(measure(tokens_, options), losses(part(0, 40), 1));
  tokens_.resize(2);
  expect_mean(measure(tokens_, options), losses(part(0, 2), 1));
  tokens_.resize(1);
  EXPECT_THROW(measure(tokens_, options), Error);
}

TEST_F(Perplexity, BosAndSecondHalf) {  // as llama.cpp
  PerplexityOptions options;
  options.context = 40, options.skipped_share = 0.5, options.bos = 5;
  tokens_.resize(80);
  std::vector<double> expected;
  for (size_t w = 0; w < 2; ++w) {
    std::vector<int32_t> window = part(40 * w, 40 * (w + 1));
    window[0] = 5;
    append(expected, losses(window, 21));
  }
  expect_mean(measure(tokens_, options), expected);
}

TEST_F(Perplexity, DensePromptIsNotScored) {
  PerplexityOptions options;
  options.context = 40, options.dense_prompt = 0.25;
  tokens_.resize(40);
  expect_mean(measure(tokens_, options), losses(part(0, 40), 11));
}

TEST_F(Perplexity, AgainstItselfNothingDiffers) {
  PerplexityOptions options;
  options.context = 40;
  const PerplexityResult r = measure(tokens_, options, &model_);
  EXPECT_EQ(r.kl.value, 0);
  EXPECT_EQ(r.same_top, 1);
  EXPECT_EQ(r.reference_nll.value, r.nll.value);
}

TEST_F(Perplexity, KlDivergenceOfAnotherModel) {
  Model other = load_model(demo_model());
  for (Layer& layer : other.layers) {
    layer.plan.groups[2].rule = {Select::topk, 64, 0, false, false};
  }
  PerplexityOptions options;
  options.context = 24, options.most_windows = 1;
  const PerplexityResult r = measure(tokens_, options, &other);
  const auto window = part(0, 24);
  const auto p = all_logits(model_, *backend_, window, 24), q = all_logits(other, *backend_, window, 24);
  const auto vocab = static_cast<size_t>(model_.config.vocab);
  double kl = 0, same = 0;
  for (size_t t = 0; t + 1 < 24; ++t) {
    const float *a = &p[t * vocab], *b = &q[t * vocab];
    double za = 0, zb = 0;
    for (size_t v = 0; v < vocab; ++v) za += std::exp(double{a[v]}), zb += std::exp(double{b[v]});
    for (size_t v = 0; v < vocab; ++v) {
      const double log_q = double{b[v]} - std::log(zb), log_p = double{a[v]} - std::log(za);
      kl += std::exp(log_q) * (log_q - log_p);
    }
    same += std::max_element(a, a + vocab) - a == std::max_element(b, b + vocab) - b;
  }
  EXPECT_NEAR(r.kl.value, kl / 23, 1e-5);
  EXPECT_GT(r.kl.value, 1e-3);
  EXPECT_NEAR(r.same_top, same / 23, 1e-9);
}

TEST_F(Perplexity, ProtocolsMakeTheirTexts) {
  const std::string text = " = Title = \n \n one\ntwo";
  const auto ids = [&](const char* name) {
    return tokenizer_.decode(protocol_tokens(find_protocol(name), tokenizer_, text), true);
  };
  EXPECT_EQ(ids("raw"), text);
  EXPECT_EQ(ids("llama.cpp"), text);
  EXPECT_EQ(ids("hf"), " = Title = \n\n\n\n\n one\n\n\ntwo\n");
  EXPECT_EQ(ids("larosa"), " = Title = \n\n\n\n\n one\n\n\ntwo\n\n\n");
  EXPECT_THROW(find_protocol("mine"), Error);
}

TEST_F(Perplexity, RefusesTextsTooShortAndForeignTokens) {
  PerplexityOptions options;
  options.context = 40;
  tokens_.resize(39);
  EXPECT_THROW(measure(tokens_, options), Error);
  tokens_.resize(40, 1 << 20);
  EXPECT_THROW(measure(tokens_, options), Error);
  tokens_ = part(0, 39);
  tokens_.resize(40);
  options.dense_prompt = 0.99;
  EXPECT_THROW(measure(tokens_, options), Error);
}

}  // namespace
}  // namespace larosa
