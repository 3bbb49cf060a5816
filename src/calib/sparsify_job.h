// One run of sparsify as its steps see it (outline, bases, planner, rounding, shards): what is asked for,
// what it works with, and how far it is. The order of the steps stands in sparsify.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "backend/algebra.h"
#include "backend/backend.h"
#include "base/progress.h"
#include "base/thread_pool.h"
#include "calib/findings.h"
#include "calib/sparsify.h"
#include "io/safetensors.h"
#include "model/config.h"
#include "model/weights.h"
#include "plan/plan.h"

namespace larosa {

// Units of progress: a window's walk through a layer is one.
inline constexpr int64_t kFoldUnits = 4, kPlanUnits = 16;

struct SparsifyJob {
  /// Reads the source's config and opens its shards, writes nothing. What is referred to must outlive the
  /// job. Throws Error for a source that cannot be read, an unknown method, an output that exists.
  SparsifyJob(const SparsifyOptions& options, std::span<const int32_t> tokens, int64_t window,
              Backend& backend, ThreadPool& pool);

  bool needs_tokens() const { return wants.text() || by_text || gptq; }
  /// Of the calibration text; 0 where it is not needed.
  int64_t windows() const { return needs_tokens() ? static_cast<int64_t>(tokens.size()) / window : 0; }
  /// The bases come from the weights alone.
  bool bases_of_weights() const { return wants.bases() && !wants.moments; }

  /// Adds units of finished work to the progress, which must have begun. Throws Interrupted.
  void tick(int64_t units, const std::string& note);
  /// "folding layer 3/32", l from 0.
  std::string layer_note(const char* doing, int64_t l) const;

  /// Gives the source's pages back, so that the resident size stays that of one layer.
  void release(const Weight& weight) const;
  void release_layer(int64_t l) const;

  const SparsifyOptions& options;
  const std::span<const int32_t> tokens;
  const int64_t window;
  Backend& backend;
  const std::unique_ptr<Algebra> algebra;  // the backend's
  ThreadPool& pool;
  const ModelConfig config;
  const Checkpoint checkpoint;  // the source
  const Method& method;
  Choice choice;  // its sparsity is that of the projections
  const Wants wants;
  const bool by_text;                 // layers' plans wait for the text
  const bool gptq;                    // projections are rounded by GPTQ
  const std::string output, partial;  // directories: the finished model's, and where it is made
  const Findings findings;
  Plan plan;  // the outline, then layer by layer what the text makes of it
  std::optional<Progress> progress;
  int64_t done = 0;  // of the progress's units
};

}  // namespace larosa
