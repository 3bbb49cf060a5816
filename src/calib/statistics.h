// Calibration: the model's own text goes through it layer by layer, and each layer's second moments are
// taken.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "calib/methods.h"
#include "model/decoder.h"

namespace larosa {

/// Walks calibration windows through a model one layer at a time, so that only one layer's weights are in
/// use.
class Calibration {
 public:
  /// tokens: windows of `window` ids each, one after another (windows · window ids in all).
  Calibration(const Checkpoint& checkpoint, const ModelConfig& config, Backend& backend, ThreadPool& pool,
              std::span<const int32_t> tokens, int64_t window);

  /// Takes all windows through layer l (to be called for l = 0, 1, …) and returns the moments that are
  /// wanted. tick() is called after every window.
  Moments layer(int64_t l, const Wants& wants, const Choice& choice, const std::function<void()>& tick);

  int64_t windows() const { return windows_; }

 private:
  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  Backend& backend_;
  ThreadPool& pool_;
  Decoder decoder_;
  int64_t window_, windows_;
  std::vector<float> stream_;  // (windows · window, dim)
};

}  // namespace larosa
