// Means with their standard errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace larosa {

/// Mean and standard error of a quantity.
struct Mean {
  double value = 0, error = 0;
};

/// Sums in the order of what is added, so that the result does not depend on the threads.
struct Sums {
  double sum = 0, squares = 0;
  int64_t count = 0;
  void add(double x) {
    sum += x;
    squares += x * x;
    ++count;
  }
  /// The error is sqrt(s² / count), s² the sample variance (count − 1); 0 for one value.
  Mean mean() const {
    const double n = static_cast<double>(count), value = sum / n;
    const double variance = count > 1 ? std::max(0.0, squares / n - value * value) / (n - 1) : 0;
    return {value, std::sqrt(variance)};
  }
};

/// exp(nll) of a mean negative log-likelihood and its standard error by the first-order rule, as llama.cpp
/// prints it.
inline Mean perplexity_of(const Mean& nll) {
  const double value = std::exp(nll.value);
  return {value, value * nll.error};
}

}  // namespace larosa
