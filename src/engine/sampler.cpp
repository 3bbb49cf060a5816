#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

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

int32_t Sampler::next(std::span<const float> logits, std::span<const int32_t> recent) {
  CHECK(!logits.empty());
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
  if (sampling_.repeat_penalty != 1.0f) {
    const size_t last = std::min(recent.size(), static_cast<size_t>(sampling_.repeat_last_n));
    for (int32_t id : std::set<int32_t>(recent.end() - static_cast<std::ptrdiff_t>(last), recent.end())) {
      float& logit = candidates_[static_cast<size_t>(id)].logit;
      logit = logit > 0 ? logit / sampling_.repeat_penalty : logit * sampling_.repeat_penalty;
    }
  }
  // NaN counts as the least likely, infinities as the ends of the range: the order and the differences below
  // are then defined whatever a broken model says.
  constexpr float kEnd = std::numeric_limits<float>::max();
  for (Candidate& c : candidates_) c.logit = std::isnan(c.logit) ? -kEnd : std::clamp(c.logit, -kEnd, kEnd);
  // Ties go to the lower id, so that the order of candidates is the same everywhere.
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  if (sampling_.temperature == 0) return std::min_element(candidates_.begin(), candidates_.end(), before)->id;
  size_t count = candidates_.size();
  if (sampling_.top_k > 0) count = std::min(count, static_cast<size_t>(sampling_.top_k));
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count),
                    candidates_.end(), before);

  const auto weights = [&](double temperature) {
    probabilities_.resize(count);
    double total = 0;
    for (size_t i = 0; i < count; ++i) {
      total += probabilities_[i] =
          std::exp((static_cast<double>(candidates_[i].logit) - static_cast<double>(candidates_[0].logit)) /
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
    if ((place -= probabilities_[i]) < 0) return candidates_[i].id;
  }
  return candidates_[count - 1].id;
}

}  // namespace larosa
