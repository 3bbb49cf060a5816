#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace larosa {

void validate(const Sampling& s) {
  if (!(s.temperature >= 0 && s.temperature <= 100))
    fail("--temp ", s.temperature, ": expected a number in [0, 100]");
  if (s.top_k < 0) fail("--top-k ", s.top_k, ": expected 0 or more");
  if (!(s.top_p > 0 && s.top_p <= 1)) fail("--top-p ", s.top_p, ": expected a number in (0, 1]");
  if (!(s.min_p >= 0 && s.min_p <= 1)) fail("--min-p ", s.min_p, ": expected a number in [0, 1]");
  if (!(s.repeat_penalty > 0 && s.repeat_penalty <= 100))
    fail("--repeat-penalty ", s.repeat_penalty, ": expected a number in (0, 100]");
  if (s.repeat_last_n < 0) fail("--repeat-last-n ", s.repeat_last_n, ": expected 0 or more");
}

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling), state_(sampling.seed) {
  validate(sampling);
}

/// splitmix64: a few operations, equal on every machine.
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

/// How many of `count` candidates, the first ones, may be drawn.
size_t Sampler::drawn_from(size_t count) const {
  if (sampling_.temperature == 0) return std::min<size_t>(count, 1);
  return sampling_.top_k > 0 ? std::min(count, static_cast<size_t>(sampling_.top_k)) : count;
}

/// The tokens whose logits the repeat penalty changes, some of them repeatedly.
std::span<const int32_t> Sampler::penalised(std::span<const int32_t> recent) const {
  if (sampling_.repeat_penalty == 1.0f) return {};
  return recent.last(std::min(recent.size(), static_cast<size_t>(sampling_.repeat_last_n)));
}

size_t Sampler::wanted(size_t vocab, std::span<const int32_t> recent) const {
  const size_t changed = penalised(recent).size();
  if (changed > 0 && sampling_.repeat_penalty < 1) return vocab;  // any of these may rise to the top
  // What is penalised only falls: at worst all of it was among the largest, and as many others take its
  // place.
  return std::min(vocab, drawn_from(vocab) + changed);
}

int32_t Sampler::next(std::span<Candidate> candidates, std::span<const int32_t> recent) {
  CHECK(!candidates.empty());
  std::vector<bool> changed;  // by token
  for (const int32_t id : penalised(recent)) {
    const auto token = static_cast<size_t>(id);
    if (token >= changed.size()) changed.resize(token + 1);
    changed[token] = true;
  }
  for (Candidate& c : candidates) {
    if (const auto token = static_cast<size_t>(c.id); token < changed.size() && changed[token])
      c.logit = c.logit > 0 ? c.logit / sampling_.repeat_penalty : c.logit * sampling_.repeat_penalty;
    c.logit = c.finite();
  }
  size_t count = drawn_from(candidates.size());
  // They are finite: asked in every comparison, all of 151,936 logits took a seventh longer.
  std::ranges::partial_sort(candidates, candidates.begin() + static_cast<std::ptrdiff_t>(count),
                            &Candidate::above);
  if (sampling_.temperature == 0) return candidates[0].id;

  const auto weights = [&](double temperature) {
    probabilities_.resize(count);
    double total = 0;
    for (size_t i = 0; i < count; ++i) {
      total += probabilities_[i] =
          std::exp((static_cast<double>(candidates[i].logit) - static_cast<double>(candidates[0].logit)) /
                   temperature);
    }
    return total;
  };
  double total = weights(1.0), sum = 0;
  size_t kept = 0;
  while (kept < count && (kept == 0 || (sum < static_cast<double>(sampling_.top_p) * total &&
                                        probabilities_[kept] >= static_cast<double>(sampling_.min_p)))) {
    sum += probabilities_[kept++];
  }
  count = kept;
  total = weights(static_cast<double>(sampling_.temperature));
  double place = uniform() * total;
  for (size_t i = 0; i < count; ++i) {
    if ((place -= probabilities_[i]) < 0) return candidates[i].id;
  }
  return candidates[count - 1].id;
}

}  // namespace larosa
