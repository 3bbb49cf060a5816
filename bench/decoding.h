// The products of a token as the decoder issues them, on random weights that come from memory.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "model/config.h"

namespace larosa {

/// What reads one row: the decoder's four products of a layer, in the order of the sites.
enum class Step { qkv, o, gate_up, down };
inline constexpr Step kSteps[] = {Step::qkv, Step::o, Step::gate_up, Step::down};
constexpr const char* step_name(Step step) {
  constexpr const char* names[] = {"q k v", "o", "gate, up", "down"};
  return names[static_cast<int>(step)];
}
std::vector<Projection> projections_of(Step step);

/// A layer's random weights again and again, projection behind projection in device memory: as many layers as
/// the model has, and more, up to kMostLayers, where its smallest product would not fill kPool.
class Weights {
 public:
  static constexpr int64_t kPool = int64_t{1} << 30;  // bytes; an L2 has 50 MB
  static constexpr int64_t kMostLayers = 1024;        // of four rows each: the backend remembers 4096 cuts

  Weights(Backend& backend, const ModelConfig& config, DType dtype, ThreadPool& pool);

  int64_t layers() const { return layers_; }
  Weight at(int64_t layer, Projection p) const;
  /// Inputs of a step, how many of them a share is, and the bytes of weights that are read for these.
  int64_t in(Step step) const { return at(0, projections_of(step)[0]).in; }
  int64_t kept(Step step, double keep) const;
  double bytes(Step step, double keep) const;

 private:
  std::array<Weight, 7> projection_;  // the first layer's, as they were made
  std::array<int64_t, 7> offset_{};
  int64_t layer_bytes_ = 0, layers_ = 0;
  std::vector<std::shared_ptr<const void>> biases_;
  std::shared_ptr<void> memory_;
};

/// Normal rows that are all different, score weights in [1, 2), and gains of one, in device memory.
class Inputs {
 public:
  static constexpr int64_t kRows = 61;  // prime, so that every layer meets every row

  Inputs(Backend& backend, int64_t widest);

  /// Row i modulo kRows, its first entries.
  Mat row(int64_t i, int64_t cols) const;
  /// The rows as a table to look a token's stream up in.
  Weight table(int64_t dim) const;
  const float* scale() const { return static_cast<const float*>(scale_.get()); }
  const float* gain() const { return static_cast<const float*>(gain_.get()); }

 private:
  int64_t widest_;
  std::shared_ptr<const void> rows_, scale_, gain_;
};

/// Issues products. keep 1: dense. Everything it is made of must outlive it.
class Decoding {
 public:
  Decoding(Backend& backend, const ModelConfig& config, const Weights& weights, const Inputs& inputs);

  /// A step of layer l, from another row every time, its norm and selection with it.
  void issue(Step step, int64_t l, double keep) { run(step, l, keep, next_row(step)); }
  /// All steps of all layers of a token. Rows stand in attention's place.
  void issue_token(double keep);

  /// The same step from what stands in memory: whole rows, or selections that `prepare` made.
  void prepare(Step step, double keep);
  void issue_ready(Step step, int64_t l);

 private:
  Mat next_row(Step step) { return inputs_.row(next_++, weights_.in(step)); }
  std::vector<Product> products(Step step, int64_t l) const;
  void run(Step step, int64_t l, double keep, Mat x);
  void finish(Step step);

  Backend& backend_;
  const ModelConfig& config_;
  const Weights& weights_;
  const Inputs& inputs_;
  std::vector<std::shared_ptr<void>> memory_;
  Mat stream_, h_, q_, k_, v_, gate_, up_, mid_;
  std::unique_ptr<Selection> kept_;
  std::vector<std::unique_ptr<Selection>> ready_;
  int64_t next_ = 0;  // row
};

}  // namespace larosa
