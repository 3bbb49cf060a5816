// The one decoder loop, in terms of the backend's operations. It knows no machine and no method: what is
// thinned stands in each layer's plan.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/model.h"

namespace larosa {

/// Sees the activations that pass a site, before they are thinned and after (calibration).
class Observer {
 public:
  virtual ~Observer() = default;
  /// entries (T, D): the vector that the site's projections read. stream (T, dim): the residual stream it was
  /// normalised from, for h1 and h3; empty for h2 and h4.
  virtual void see(Site site, Mat entries, Mat stream) = 0;
  /// a (T, F): a(gate) of every neuron, before some of them are chosen.
  virtual void see_neurons(Mat a) { (void)a; }
  /// entries (T, D): the same as the layer's group `group` reads it, with zeros where it was thinned.
  virtual void read(size_t group, Mat entries) {
    (void)group;
    (void)entries;
  }
};

/// Channels that rows have read, by layer and projection.
struct Tally {
  std::vector<std::array<int64_t, 7>> kept;  // by layer, Projection
  int64_t rows = 0;                          // that went through layer 0
};

/// How rows are treated.
struct Pass {
  bool dense = false;  // read every channel whatever the plan says, but for what the model was trained with
  Observer* observer = nullptr;
  Tally* tally = nullptr;  // counts what was kept; not with dense
};

/// Consecutive rows at positions pos … pos + rows − 1 of a cache. A later segment may go back: what it writes
/// replaces what stood there, so that several continuations follow one context, and several texts one
/// another.
struct Segment {
  int64_t rows = 0, pos = 0;

  int64_t end() const { return pos + rows; }
};

class Decoder {
 public:
  /// Rows that go through the layers at once; longer inputs are cut. Bounds the working memory.
  static constexpr int64_t kBatch = 512;

  /// Scratch for up to max_rows rows at once. config and backend must outlive the decoder.
  Decoder(const ModelConfig& config, Backend& backend, int64_t max_rows = kBatch);
  ~Decoder();

  /// x (T, dim) = embeddings of tokens; T ≤ max_rows.
  void embed(const OuterWeights& outer, std::span<const int32_t> tokens, Mat x);

  /// One layer on x (T, dim): segments of T rows together of `cache`, whose layer `cache_layer` it uses;
  /// `index` is the layer's number in the model (its window). T ≤ max_rows. Returns where the stream is, in
  /// the basis behind the layer: x or, where it has changed basis once, the decoder's memory, until the next
  /// call with anything but it. x is overwritten.
  Mat layer(const Layer& layer, int64_t index, KvCache& cache, int64_t cache_layer,
            std::span<const Segment> segments, Mat x, const Pass& pass);
  /// The same for positions pos … pos + T − 1.
  Mat layer(const Layer& layer, int64_t index, KvCache& cache, int64_t cache_layer, int64_t pos, Mat x,
            const Pass& pass) {
    const Segment segment{x.rows, pos};
    return this->layer(layer, index, cache, cache_layer, std::span(&segment, 1), x, pass);
  }

  /// next (T, dim) = x in another basis of the stream. x aliases not next.
  void adapt(const Adapter& adapter, Mat x, Mat next);

  /// hidden (T, dim) = the normalised last hidden states of tokens at positions pos … of cache. Any T ≥ 1.
  void forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache, int64_t pos,
               const Pass& pass, Mat hidden);
  /// The same for segments of as many rows together as there are tokens.
  void forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache,
               std::span<const Segment> segments, const Pass& pass, Mat hidden);

  /// logits (T, vocab) of normalised hidden states (T, dim).
  void logits(const Model& model, Mat hidden, Mat logits);

  int64_t max_rows() const { return max_rows_; }

 private:
  struct Step;
  void run(const Model& model, std::span<const int32_t> tokens, KvCache& cache,
           std::span<const Segment> segments, const Pass& pass, Mat hidden);
  void apply(const Step& step, Site site, Mat entries);
  void select(const Rule& rule, const float* scale, Mat entries);
  void rescale(Site site, Mat room);
  void add_low_rank(const Step& step, size_t group, Mat entries);
  void choose_neurons(const Step& step, Mat entries);

  const ModelConfig& config_;
  Backend& backend_;
  const std::vector<float> frequencies_;
  int64_t max_rows_;
  std::shared_ptr<void> memory_;
  std::shared_ptr<const void> inv_freq_;
  // Gains of 1/√D, with which rms_norm gives rows of length 1: by Site, made where a rule rescales.
  struct UnitGain {
    std::vector<float> values;  // (D)
    std::shared_ptr<const void> memory;
  };
  std::array<UnitGain, 4> unit_gains_;
  Mat h_, q_, k_, v_, att_, gate_, up_, mid_, x_, next_, turned_, back_;
  std::unique_ptr<Selection> kept_;
};

}  // namespace larosa
