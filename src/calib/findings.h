// What calibration found, layer by layer, in files: an interrupted sparsify goes on with them, and what no
// sparsity changes can be left to the next one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "calib/allocate.h"
#include "calib/fold.h"
#include "calib/methods.h"

namespace larosa {

/// A safetensors file written to a temporary name and renamed when complete.
void write_tensors(const std::filesystem::path& path, std::span<const FoldedTensor> tensors,
                   const std::map<std::string, std::string>& metadata);

/// Files that hold something else than they should are Errors naming them.
class Findings {
 public:
  /// `work`: directory of one run. `kept`: where bases and curves stand, which depend on the dense model, the
  /// text and the choice but not on its sparsity; `work` itself where they end with the run.
  Findings(std::filesystem::path work, std::filesystem::path kept)
      : work_(std::move(work)), kept_(std::move(kept)) {}

  bool has_bases(int64_t l) const;
  void write_bases(int64_t l, const Bases& bases) const;
  Bases read_bases(int64_t l, const ModelConfig& config, const Wants& wants) const;

  /// What each group of layer l costs its output.
  bool has_curves(int64_t l) const;
  void write_curves(int64_t l, const std::vector<Curve>& curves) const;
  std::vector<Curve> read_curves(int64_t l, const ModelConfig& config, const LayerPlan& outline) const;

  bool has_plan(int64_t l) const;
  void write_plan(int64_t l, const LayerPlan& plan) const;
  /// Differs from `outline` in numbers alone: what is kept, and the cuts.
  LayerPlan read_plan(int64_t l, const LayerPlan& outline) const;

  /// low_rank(m, rank) of projection p, (in, rank) and (rank, out): made once, then read.
  std::pair<Matrix, Matrix> low_rank_of(int64_t l, Projection p, const Matrix& m, int64_t rank,
                                        Algebra& algebra) const;

  /// True when a file of the run's own directory is worth a resume.
  bool any() const;
  /// Removes the files of the run's own directory.
  void remove() const;

 private:
  std::filesystem::path work_, kept_;
};

}  // namespace larosa
