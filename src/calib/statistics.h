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
  Calibration(const OuterWeights& outer, const ModelConfig& config, Backend& backend, ThreadPool& pool,
              std::span<const int32_t> tokens, int64_t window);

  /// Takes all windows through layer number l as its plan says, and into the next layer's basis (to be called
  /// for l = 0, 1, …). tick() is called after every window.
  void walk(const Layer& layer, int64_t l, const Pass& pass, const std::function<void()>& tick);

  /// The same dense, and returns the moments that are wanted.
  Moments moments(const Layer& layer, int64_t l, const Wants& wants, const Choice& choice,
                  const std::function<void()>& tick);

  /// Second moments of what each group of the layer's plan reads, thinned, without moving on.
  std::vector<Matrix> read_moments(const Layer& layer, int64_t l, const std::function<void()>& tick);

  int64_t windows() const { return windows_; }

 private:
  void walk_window(const Layer& layer, int64_t l, const Pass& pass, Mat rows);

  const ModelConfig& config_;
  Backend& backend_;
  ThreadPool& pool_;
  Decoder decoder_;
  int64_t window_, windows_;
  std::vector<float> stream_;   // (windows · window, dim)
  std::vector<float> scratch_;  // (window, dim)
};

}  // namespace larosa
