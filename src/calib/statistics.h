// Calibration: the model's own text goes through it layer by layer, and each layer's second moments are
// taken.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/algebra.h"
#include "backend/backend.h"
#include "calib/methods.h"
#include "model/decoder.h"

namespace larosa {

/// Rows in a backend's memory.
struct StoredRows {
  StoredRows() = default;
  StoredRows(Backend& backend, int64_t rows, int64_t cols)
      : memory(backend.allocate(rows * cols * static_cast<int64_t>(sizeof(float)))),
        mat(static_cast<float*>(memory.get()), rows, cols) {}

  std::shared_ptr<void> memory;
  Mat mat;
};

/// How far a plan takes a layer's output stream y from the dense layer's y', of the same input.
struct LayerError {
  double relative = 0;  // mean over the tokens of |y − y'|² / |y'|²: RMSNorm takes the stream's size away
  double update = 0;    // mean of |y − y'|² / |y' − x|², x the layer's input: of what the layer adds
  double absolute = 0;  // mean of |y − y'|²
};

/// A layer and some of what reaches it, to be run again and again under different plans.
class Trial {
 public:
  /// rows (windows · window, dim): prefixes of windows, the layer's input. Runs them dense. `layer`, whose
  /// tensors are in the backend's memory, and what stands behind the references must outlive the trial;
  /// window ≤ the decoder's rows.
  Trial(Layer& layer, int64_t l, const ModelConfig& config, Backend& backend, Decoder& decoder,
        StoredRows rows, int64_t window);

  /// Of a plan with the layer's own groups; through the one interpreter. Leaves the layer's plan as it was.
  LayerError error(const LayerPlan& plan);

  /// Rows per window and windows of a sample. With half the rows (and allocate.cpp's steps twice as long)
  /// teal greedy at 50 % on demo-7m has perplexity 22.00 instead of 21.55.
  static constexpr int64_t kWindow = 256, kWindows = 2;

 private:
  std::vector<float> run(const Pass& pass);
  std::vector<float> read(Mat rows);

  Layer& layer_;
  int64_t index_;
  const ModelConfig& config_;
  Backend& backend_;
  Decoder& decoder_;
  const StoredRows rows_, out_;  // the input; room for an output
  std::vector<float> dense_;     // output, on the host
  // Squares of each row of the output, and of what the layer has added to it.
  std::vector<double> size_, added_;
  int64_t window_;
};

/// Walks calibration windows through a model one layer at a time, so that only one layer's weights are in
/// use. Layers have their tensors in the backend's memory (`place`).
class Calibration {
 public:
  /// tokens: windows of `window` ids each, one after another (windows · window ids in all). outer: the
  /// host's. `algebra` is the backend's.
  Calibration(const OuterWeights& outer, const ModelConfig& config, Backend& backend, Algebra& algebra,
              std::span<const int32_t> tokens, int64_t window);

  /// Takes all windows through layer number l as its plan says, and into the next layer's basis (to be called
  /// for l = 0, 1, …). tick() is called after every window.
  void walk(const Layer& layer, int64_t l, const Pass& pass, const std::function<void()>& tick);

  /// The same dense, and returns the moments that are wanted.
  Moments moments(const Layer& layer, int64_t l, const Wants& wants, const Choice& choice,
                  const std::function<void()>& tick);

  /// Second moments of what each group of the layer's plan reads, thinned, without moving on.
  std::vector<Matrix> read_moments(const Layer& layer, int64_t l, const std::function<void()>& tick);

  /// How large what passes the layer's sites is, dense or as its plan says, without moving on.
  LayerMagnitudes magnitudes(const Layer& layer, int64_t l, const Pass& pass);

  /// The layer with the first tokens of some windows.
  Trial trial(Layer& layer, int64_t l);

  /// The stream in another basis, x ← x B: what an embedding in that basis would have given.  B (dim, dim)
  void turn(const Matrix& basis);

  int64_t windows() const { return windows_; }

 private:
  void observe(const Layer& layer, int64_t l, const Pass& pass, const std::function<void()>& tick);
  void walk_window(const Layer& layer, int64_t l, const Pass& pass, Mat rows);
  Mat window(int64_t w) const { return stream_.mat.slice(w * window_, window_); }
  Mat scratch();

  const ModelConfig& config_;
  Backend& backend_;
  Algebra& algebra_;
  Decoder decoder_;
  int64_t window_, windows_;
  StoredRows stream_;   // (windows · window, dim)
  StoredRows scratch_;  // (window, dim), made when it is needed
};

}  // namespace larosa
