// What Backend::largest is tested with: rows, and what it finds in them, written plainly.
#pragma once

#include "cases.h"

namespace larosa::cases {

/// The hard rows, a row with few entries that are not negative, one of ends of the range and what counts as
/// them, and one whose largest entries stand at its ends and around every thirty-second of it, where a device
/// may cut it up.
inline Rows rows_of_logits(int64_t n, Random& random) {
  const Rows hard = hard_rows(n, random);
  const int64_t first = hard.mat.rows;
  Rows rows(first + 3, n);
  for (int64_t t = 0; t < first; ++t) std::copy_n(hard.mat.row(t), n, rows.mat.row(t));
  constexpr float kEnd = std::numeric_limits<float>::max();
  const float near = std::nextafter(kEnd, 0.0f), ends[] = {kInf, kEnd, near, -kInf, -kEnd, -near, kNan};
  for (int64_t i = 0; i < n; ++i) {
    rows.mat.row(first)[i] = random.normal() - 2;
    rows.mat.row(first + 1)[i] = ends[random.below(std::size(ends))];
    rows.mat.row(first + 2)[i] = random.normal();
  }
  for (int64_t cut = 0; cut <= 32; ++cut) {
    const int64_t at = n * cut / 32;
    for (int64_t i = std::max<int64_t>(at - 4, 0); i < std::min(at + 4, n); ++i)
      rows.mat.row(first + 2)[i] = 100 + random.normal();
  }
  return rows;
}

/// How many to ask for.
inline std::vector<int64_t> largest_counts(int64_t n) {
  std::set<int64_t> counts;
  for (const int64_t count : {int64_t{1}, int64_t{40}, int64_t{104}, int64_t{256}, n})
    counts.insert(std::min(n, count));
  return {counts.begin(), counts.end()};
}

/// All entries in order: the larger one first, among equals the lower index.
inline std::vector<Candidate> sorted_entries(const float* x, int64_t n) {
  constexpr double kEnd = std::numeric_limits<float>::max();
  const auto value = [&](const Candidate& c) {
    return std::isnan(c.logit) ? -kEnd : std::min(std::max(double{c.logit}, -kEnd), kEnd);
  };
  std::vector<Candidate> all;
  for (int64_t i = 0; i < n; ++i) all.push_back({x[i], static_cast<int32_t>(i)});
  std::stable_sort(all.begin(), all.end(),
                   [&](const Candidate& a, const Candidate& b) { return value(a) > value(b); });
  return all;
}

/// The first place where `found` is not the beginning of `all`, to the bit; or −1.
inline int64_t first_difference(const std::vector<Candidate>& found, const std::vector<Candidate>& all) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].id != all[i].id ||
        std::bit_cast<uint32_t>(found[i].logit) != std::bit_cast<uint32_t>(all[i].logit))
      return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace larosa::cases
