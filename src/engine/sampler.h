// From logits to the next token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "larosa/engine.h"

namespace larosa {

/// Throws Error naming the flag for values that make no sense (NaN, negative, top_p above 1 …).
void validate(const Sampling& sampling);

/// Draws from the largest logits, however many there are in all.
class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);
  /// How many of `vocab` logits, the largest ones, `next` has to see after the tokens `recent`.
  size_t wanted(size_t vocab, std::span<const int32_t> recent) const;
  /// The next token after `recent`. candidates: as many as wanted, in any order; nothing of use afterwards.
  /// Equal seeds and inputs give equal tokens.
  int32_t next(std::span<Candidate> candidates, std::span<const int32_t> recent);

 private:
  size_t drawn_from(size_t count) const;
  std::span<const int32_t> penalised(std::span<const int32_t> recent) const;
  double uniform();

  Sampling sampling_;
  uint64_t state_;
  std::vector<double> probabilities_;
};

}  // namespace larosa
