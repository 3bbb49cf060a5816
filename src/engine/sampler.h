// From logits to the next token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace larosa {

/// Applied in this order: repeat penalty, top-k, top-p, min-p, temperature, draw.
struct Sampling {
  float temperature = 0.8f;  // 0: always the most likely token
  int top_k = 40;            // 0: all
  float top_p = 0.95f;       // 1: all
  float min_p = 0.05f;       // of the most likely one's probability; 0: all
  float repeat_penalty =
      1.0f;  // 1: none; the logit of a recent token is divided (or multiplied when negative) by it
  int repeat_last_n = 64;  // how many tokens count as recent
  uint64_t seed = 0;
};

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
