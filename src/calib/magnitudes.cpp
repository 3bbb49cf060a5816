#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"
#include "calib/methods.h"

namespace larosa {
namespace {

// A float's bits without its sign order as its size does: exponent and the first 11 bits of the fraction.
constexpr int kDropped = 12;
constexpr size_t kBins = size_t{1} << (31 - kDropped);

uint32_t size_bits(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}

}  // namespace

void Magnitudes::add(Mat entries, const float* scale) {
  bins_.resize(kBins);
  for (int64_t t = 0; t < entries.rows; ++t) {
    for (int64_t i = 0; i < entries.cols; ++i) {
      const float x = entries.row(t)[i];
      ++bins_[size_bits(scale ? x * scale[i] : x) >> kDropped];
    }
  }
  count_ += entries.rows * entries.cols;
}

float Magnitudes::quantile(double level) const {
  const double wanted = level * static_cast<double>(count_);
  if (wanted < 0.5) return 0;
  int64_t below = 0;
  for (size_t bin = 0; bin < bins_.size(); ++bin) {
    below += bins_[bin];
    if (static_cast<double>(below) < wanted) continue;
    const float edge = std::bit_cast<float>((static_cast<uint32_t>(bin + 1) << kDropped) - 1);
    if (std::isfinite(edge)) return edge;
    break;
  }
  fail("calibration: the activations are not finite");
}

double Magnitudes::share_above(float cut) const {
  int64_t above = 0;
  for (size_t bin = (size_bits(cut) >> kDropped) + 1; bin < bins_.size(); ++bin) above += bins_[bin];
  // A cut of 0 is below every bin but drops nothing else than zeros, which share the first one.
  if (cut == 0 && !bins_.empty()) above += bins_[0];
  return count_ > 0 ? static_cast<double>(above) / static_cast<double>(count_) : 1;
}

}  // namespace larosa
