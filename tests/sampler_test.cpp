// From logits to tokens: every filter on logits made by hand, and the frequencies of many draws.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "base/error.h"
#include "largest.h"

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

/// What the sampler wants of a row, out of order.
std::vector<Candidate> candidates_of(const Sampler& sampler, std::vector<float> logits,
                                     const std::vector<int32_t>& recent) {
  static const auto backend = make_ref_backend();
  std::vector<Candidate> candidates(sampler.wanted(logits.size(), recent));
  backend->largest(Mat(logits.data(), 1, static_cast<int64_t>(logits.size())), candidates);
  std::reverse(candidates.begin(), candidates.end());
  return candidates;
}
int32_t next(Sampler& sampler, const std::vector<float>& logits, const std::vector<int32_t>& recent) {
  std::vector<Candidate> candidates = candidates_of(sampler, logits, recent);
  return sampler.next(candidates, recent);
}
/// The first token.
int32_t first(const Sampling& sampling, const std::vector<float>& logits,
              const std::vector<int32_t>& recent = {}) {
  Sampler sampler(sampling);
  return next(sampler, logits, recent);
}

/// Draws many tokens and compares their frequencies with `expected` (unnormalised), within 4 sigma.
void expect_frequencies(const Sampling& sampling, const std::vector<float>& logits,
                        const std::vector<double>& expected, const std::vector<int32_t>& recent = {}) {
  Sampler sampler(sampling);
  std::vector<int> count(logits.size());
  for (int n = 0; n < kDraws; ++n) ++count[static_cast<size_t>(next(sampler, logits, recent))];
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
  EXPECT_EQ(first(s, {1, 5, 2, 5}), 1);
  EXPECT_EQ(first(s, {-3, -2, -1}), 2);
  EXPECT_EQ(first(s, {7, 7, 7}), 0);
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
  EXPECT_EQ(first(s, logits), 0);
  EXPECT_EQ(first(s, logits, {0}), 1);  // 4 → 2
  EXPECT_EQ(first(s, logits, {0, 0, 1}),
            0);                              // once, however often it stands there
  EXPECT_EQ(first(s, {-1, -1.5f}, {0}), 1);  // −1 → −2
  s.repeat_last_n = 2;
  EXPECT_EQ(first(s, logits, {0, 3, 3}), 0);  // too long ago
  s.repeat_last_n = 0;
  EXPECT_EQ(first(s, logits, {0}), 0);
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
    for (int n = 0; n < 20; ++n) tokens.push_back(next(sampler, logits, tokens));
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
      EXPECT_EQ(first(s, {kNan, 1, kNan, -5000}, recent), 1);
      EXPECT_EQ(first(s, {-kInf, 1, kInf, 1}, recent), 2);
      EXPECT_EQ(first(s, {-kInf, -kInf, -kInf, 0}, recent), 3);
      for (const float all : {kNan, kInf, -kInf}) {
        const int32_t id = first(s, std::vector<float>(50, all), recent);
        EXPECT_TRUE(id >= 0 && id < 50);
      }
    }
  }
  std::vector<float> many(4000);
  for (size_t i = 0; i < many.size(); ++i) many[i] = i % 3 == 0 ? kNan : static_cast<float>(i % 7);
  Sampler sampler(plain());
  for (int n = 0; n < 200; ++n) EXPECT_NE(next(sampler, many, {}) % 3, 0);
}

/// The sampler as it was when it was given all logits, in one piece.
struct PlainSampler {
  explicit PlainSampler(const Sampling& sampling) : s(sampling), state(sampling.seed) {}

  double uniform() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }

  int32_t next(const std::vector<float>& logits, const std::vector<int32_t>& recent) {
    std::vector<std::pair<float, int32_t>> all;
    for (size_t i = 0; i < logits.size(); ++i) all.emplace_back(logits[i], static_cast<int32_t>(i));
    if (s.repeat_penalty != 1.0f) {
      const size_t last = std::min(recent.size(), static_cast<size_t>(s.repeat_last_n));
      for (int32_t id : std::set<int32_t>(recent.end() - static_cast<std::ptrdiff_t>(last), recent.end())) {
        float& logit = all[static_cast<size_t>(id)].first;
        logit = logit > 0 ? logit / s.repeat_penalty : logit * s.repeat_penalty;
      }
    }
    constexpr float kEnd = std::numeric_limits<float>::max();
    for (auto& [logit, id] : all) logit = std::isnan(logit) ? -kEnd : std::clamp(logit, -kEnd, kEnd);
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    if (s.temperature == 0) return all[0].second;
    if (s.top_k > 0) all.resize(std::min(all.size(), static_cast<size_t>(s.top_k)));
    const auto weight = [&](size_t i, double temperature) {
      return std::exp((double{all[i].first} - double{all[0].first}) / temperature);
    };
    double total = 0, sum = 0;
    for (size_t i = 0; i < all.size(); ++i) total += weight(i, 1);
    size_t kept = 0;
    while (kept < all.size() &&
           (kept == 0 || (sum < double{s.top_p} * total && weight(kept, 1) >= double{s.min_p})))
      sum += weight(kept++, 1);
    total = 0;
    for (size_t i = 0; i < kept; ++i) total += weight(i, double{s.temperature});
    double place = uniform() * total;
    for (size_t i = 0; i < kept; ++i) {
      if ((place -= weight(i, double{s.temperature})) < 0) return all[i].second;
    }
    return all[kept - 1].second;
  }

  Sampling s;
  uint64_t state;
};

/// A few of the logits are enough: the token is the one that all of them give.
TEST(Sampler, TheLargestLogitsGiveTheTokenOfAll) {
  cases::Random random(6);
  const auto any = [&](const auto& of) { return of[static_cast<size_t>(random.below(std::ssize(of)))]; };
  const float temperatures[] = {0, 0, 0.3f, 0.8f, 1, 20}, top_ps[] = {0.3f, 0.95f, 1},
              min_ps[] = {0, 0, 0.05f, 1}, penalties[] = {0.5f, 0.99f, 1, 1.05f, 1.3f, 2, 100};
  const int top_ks[] = {0, 1, 2, 5, 40, 400}, last_ns[] = {0, 1, 3, 64};
  int64_t fewer = 0, changed = 0;
  for (int round = 0; round < 700; ++round) {
    const int64_t n = std::array{1, 2, 7, 60, 300}[static_cast<size_t>(round % 5)];
    const cases::Rows rows = cases::rows_of_logits(n, random);
    for (int64_t t = 0; t < rows.mat.rows; ++t) {
      const std::vector<float> logits(rows.mat.row(t), rows.mat.row(t) + n);
      Sampling s;
      s.temperature = any(temperatures), s.top_p = any(top_ps), s.min_p = any(min_ps), s.top_k = any(top_ks);
      s.repeat_penalty = any(penalties), s.repeat_last_n = any(last_ns);
      s.seed = static_cast<uint64_t>(random.below(1000));
      // Recent tokens are likely ones, as they are in a text.
      const std::vector<Candidate> order = cases::sorted_entries(logits.data(), n);
      std::vector<int32_t> recent;
      for (int64_t i = random.below(20); i > 0; --i)
        recent.push_back(order[static_cast<size_t>(random.below(random.below(n) + 1))].id);
      Sampler sampler(s);
      PlainSampler plain_sampler(s);
      for (int draw = 0; draw < 3; ++draw) {
        SCOPED_TRACE("round " + std::to_string(round) + " row " + std::to_string(t));
        const int32_t id = plain_sampler.next(logits, recent);
        ASSERT_EQ(next(sampler, logits, recent), id);
        fewer += sampler.wanted(logits.size(), recent) < logits.size();
        changed += s.temperature == 0 && id != order[0].id;
        recent.push_back(id);
      }
    }
  }
  EXPECT_GT(fewer, 5000);   // fewer logits than there are
  EXPECT_GT(changed, 300);  // the penalty decided
}

TEST(Sampler, WantsWhatTopKAndThePenaltyNeed) {
  Sampling s;  // the 40 most likely, no penalty
  const std::vector<int32_t> recent = {3, 4, 3, 5};
  const auto wanted = [&](size_t vocab) { return Sampler(s).wanted(vocab, recent); };
  EXPECT_EQ(wanted(1000), 40u);
  EXPECT_EQ(wanted(30), 30u);
  s.repeat_penalty = 1.1f;
  EXPECT_EQ(wanted(1000), 44u);
  EXPECT_EQ(wanted(42), 42u);
  s.repeat_last_n = 2;
  EXPECT_EQ(wanted(1000), 42u);
  s.temperature = 0;
  EXPECT_EQ(wanted(1000), 3u);
  s.repeat_penalty = 0.9f;
  EXPECT_EQ(wanted(1000), 1000u);  // a logit that rises may come from anywhere
  s.repeat_last_n = 0;
  EXPECT_EQ(wanted(1000), 1u);
  s = plain();
  EXPECT_EQ(wanted(1000), 1000u);
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
