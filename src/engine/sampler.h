// From logits to the next token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "larosa/engine.h"

namespace larosa {

/// Throws Error naming the flag for values that make no sense (NaN, negative, top_p above 1 …).
void validate(const Sampling& sampling);

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);
  /// The next token. logits (vocab) are not changed; recent: the tokens so far. Equal seeds and inputs give
  /// equal tokens.
  int32_t next(std::span<const float> logits, std::span<const int32_t> recent);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  double uniform();

  Sampling sampling_;
  uint64_t state_;
  std::vector<Candidate> candidates_;
  std::vector<double> probabilities_;
};

}  // namespace larosa
