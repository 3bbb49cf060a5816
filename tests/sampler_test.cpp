// From logits to tokens: every filter on logits made by hand, and the frequencies of many draws.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "base/error.h"

namespace larosa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kDraws = 20000;

Sampling plain() {
  Sampling s;
  s.temperature = 1;
  s.top_k = 0;
  s.top_p = 1;
  s.min_p = 0;
  return s;
}

std::vector<float> logs(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)) + 3);
  return logits;
}

/// Draws many tokens and compares their frequencies with `expected` (unnormalised), within 4 sigma.
void expect_frequencies(const Sampling& sampling, const std::vector<float>& logits,
                        const std::vector<double>& expected, const std::vector<int32_t>& recent = {}) {
  Sampler sampler(sampling);
  std::vector<int> count(logits.size());
  for (int n = 0; n < kDraws; ++n) ++count[static_cast<size_t>(sampler.next(logits, recent))];
  double total = 0;
  for (double e : expected) total += e;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double p = expected[i] / total;
    EXPECT_NEAR(count[i], kDraws * p, 4 * std::sqrt(kDraws * p * (1 - p))) << "token " << i;
  }
}

TEST(Sampler, TemperatureZeroTakesTheLargestAndTheLowerOfEqualOnes) {
  Sampling s = plain();
  s.temperature = 0;
  EXPECT_EQ(Sampler(s).next(std::vector<float>{1, 5, 2, 5}, {}), 1);
  EXPECT_EQ(Sampler(s).next(std::vector<float>{-3, -2, -1}, {}), 2);
  EXPECT_EQ(Sampler(s).next(std::vector<float>{7, 7, 7}, {}), 0);
}

TEST(Sampler, DrawsByProbability) {
  expect_frequencies(plain(), logs({0.5, 0.05, 0.3, 0.15}), {0.5, 0.05, 0.3, 0.15});
}

TEST(Sampler, Temperature) {
  Sampling s = plain();
  s.temperature = 0.5f;
  expect_frequencies(s, logs({0.5, 0.2, 0.3}), {0.25, 0.04, 0.09});
  s.temperature = 2;
  expect_frequencies(s, logs({0.64, 0.36}), {0.8, 0.6});
}

TEST(Sampler, TopK) {
  Sampling s = plain();
  s.top_k = 2;
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, 0.4, 0, 0.3});
  expect_frequencies(s, {0, 0, 0, 0}, {1, 1, 0, 0});  // ties: the lower ids
  s.top_k = 100;
  expect_frequencies(s, logs({0.75, 0.25}), {0.75, 0.25});
}

TEST(Sampler, TopP) {
  Sampling s = plain();
  s.top_p = 0.6f;  // the one that reaches it is kept
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, 0.4, 0, 0.3});
  s.top_p = 1e-6f;  // never empty
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, 1, 0, 0});
}

TEST(Sampler, MinP) {
  Sampling s = plain();
  s.min_p = 0.45f;  // of 0.4
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, 0.4, 0.2, 0.3});
  s.min_p = 1;
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, 1, 0, 0});
}

TEST(Sampler, FiltersBeforeTemperature) {
  Sampling s = plain();
  s.top_p = 0.6f;
  s.temperature = 2;  // applied first it would flatten, and a third token would pass
  expect_frequencies(s, logs({0.1, 0.4, 0.2, 0.3}), {0, std::sqrt(0.4), 0, std::sqrt(0.3)});
}

TEST(Sampler, RepeatPenalty) {
  Sampling s = plain();
  s.temperature = 0;
  s.repeat_penalty = 2;
  const std::vector<float> logits = {4, 3, 1.5f, -1};
  EXPECT_EQ(Sampler(s).next(logits, {}), 0);
  EXPECT_EQ(Sampler(s).next(logits, std::vector<int32_t>{0}), 1);  // 4 → 2
  EXPECT_EQ(Sampler(s).next(logits, std::vector<int32_t>{0, 0, 1}),
            0);  // once, however often it stands there
  EXPECT_EQ(Sampler(s).next(std::vector<float>{-1, -1.5f}, std::vector<int32_t>{0}), 1);  // −1 → −2
  s.repeat_last_n = 2;
  EXPECT_EQ(Sampler(s).next(logits, std::vector<int32_t>{0, 3, 3}), 0);  // too long ago
  s.repeat_last_n = 0;
  EXPECT_EQ(Sampler(s).next(logits, std::vector<int32_t>{0}), 0);
  s = plain();
  s.repeat_penalty = 2;
  expect_frequencies(s, {2, 1}, {std::exp(1.0), std::exp(1.0)}, {0});
}

TEST(Sampler, EqualSeedsGiveEqualTokens) {
  const std::vector<float> logits(1000, 0.0f);
  const auto draw = [&](uint64_t seed) {
    Sampling s = plain();
    s.seed = seed;
    Sampler sampler(s);
    std::vector<int32_t> tokens;
    for (int n = 0; n < 20; ++n) tokens.push_back(sampler.next(logits, tokens));
    return tokens;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(Sampler, NanAndInfinityAreSafe) {
  for (const float temperature : {0.0f, 1e-30f, 1.0f}) {
    Sampling s = plain();
    s.temperature = temperature;
    for (const float penalty : {1.0f, 100.0f}) {
      s.repeat_penalty = penalty;
      const std::vector<int32_t> recent = {1};
      EXPECT_EQ(Sampler(s).next(std::vector<float>{kNan, 1, kNan, -5000}, recent), 1);
      EXPECT_EQ(Sampler(s).next(std::vector<float>{-kInf, 1, kInf, 1}, recent), 2);
      EXPECT_EQ(Sampler(s).next(std::vector<float>{-kInf, -kInf, -kInf, 0}, recent), 3);
      for (const float all : {kNan, kInf, -kInf}) {
        const int32_t id = Sampler(s).next(std::vector<float>(50, all), recent);
        EXPECT_TRUE(id >= 0 && id < 50);
      }
    }
  }
  std::vector<float> many(4000);
  for (size_t i = 0; i < many.size(); ++i) many[i] = i % 3 == 0 ? kNan : static_cast<float>(i % 7);
  Sampler sampler(plain());
  for (int n = 0; n < 200; ++n) EXPECT_NE(sampler.next(many, {}) % 3, 0);
}

TEST(Sampler, ValidateNamesTheFlag) {
  const auto expect = [](const std::string& flag, const std::function<void(Sampling&)>& change) {
    Sampling s;
    change(s);
    try {
      validate(s);
      ADD_FAILURE() << flag << " was taken";
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).find(flag + " "), 0u) << e.what();
    }
    EXPECT_THROW(Sampler{s}, Error);
  };
  EXPECT_NO_THROW(validate(Sampling{}));
  for (const float bad : {-0.1f, 101.0f, kNan, kInf})
    expect("--temp", [&](Sampling& s) { s.temperature = bad; });
  for (const float bad : {0.0f, -1.0f, 1.01f, kNan}) expect("--top-p", [&](Sampling& s) { s.top_p = bad; });
  for (const float bad : {-0.1f, 1.01f, kNan}) expect("--min-p", [&](Sampling& s) { s.min_p = bad; });
  for (const float bad : {0.0f, -1.0f, 101.0f, kNan})
    expect("--repeat-penalty", [&](Sampling& s) { s.repeat_penalty = bad; });
  expect("--top-k", [](Sampling& s) { s.top_k = -1; });
  expect("--repeat-last-n", [](Sampling& s) { s.repeat_last_n = -1; });
}

}  // namespace
}  // namespace larosa
