// Rounding that looks at what a weight is multiplied with: channels are quantised one after another, and what
// each one's rounding does to the products is taken up by the channels that follow (GPTQ, arXiv 2210.17323,
// in our layout: a line is an input channel, so its scales are chosen when it is reached, and the order of
// the channels is free). Weights by outputs are rounded in the same order.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "calib/fold.h"
#include "calib/matrix.h"

namespace larosa {

class Algebra;
class ThreadPool;

/// What rounding needs to know of a site's inputs: the order of the channels and how an error in one is made
/// up for by those before it.
struct RoundingFactor {
  std::vector<int64_t> order;  // (D) channels by ascending second moment; rounded from the last to the first
  std::vector<float> factor;   // (D, D) lower triangle L⁻¹ of the ordered moments A = L Lᵀ, row by row
};

/// From second moments (upper triangle; taken apart): `damping` times the mean of the diagonal is added to
/// it, channels are ordered so that those that matter most are rounded first. Float64 until the last step.
/// Memory: 12 bytes per entry of the matrix. Throws Error when the moments are not finite.
RoundingFactor rounding_factor(Matrix&& moments, double damping, Algebra& algebra);

/// Rounds a projection's weight to lines of `dtype` in its own layout so that tr(Δᵀ H Δ) of the rounding
/// error Δ is small, H the moments behind `factor`. In rows, where a scale serves channels that come at
/// different times, scales are those of the nearest rounding. Throws Error naming the tensor when a value is
/// not finite.
FoldedTensor round_by_moments(const std::string& name, const Weight& weight, DType dtype,
                              const RoundingFactor& factor, ThreadPool& pool);

}  // namespace larosa
