// Medians of timings.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace larosa {

/// Of an even number the mean of the middle two. At least one value.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

/// Of above[i] / below[i], taken within a repetition: a slow moment of the machine touches both sides.
inline double median_ratio(const std::vector<double>& above, const std::vector<double>& below) {
  std::vector<double> ratios;
  for (size_t i = 0; i < above.size(); ++i) ratios.push_back(above[i] / below[i]);
  return median(ratios);
}

}  // namespace larosa
