#include "calib/sparsify.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "calib/bases.h"
#include "calib/outline.h"
#include "calib/planner.h"
#include "calib/resume.h"
#include "calib/rounding.h"
#include "calib/shards.h"
#include "calib/sparsify_job.h"
#include "model/model.h"

namespace larosa {
namespace {

/// Checks everything that can be checked before the first byte is written.
void check(const SparsifyJob& job) {
  const ModelConfig& config = job.config;
  if (is_larosa_dir(job.options.source))
    fail(job.options.source, ": config.json: field larosa: is the output of sparsify, not a source");
  if (job.options.check_tensors) job.checkpoint.check_finite();
  if (job.needs_tokens() && static_cast<int64_t>(job.tokens.size()) < job.window)
    fail("calibration: ", job.tokens.size(), " tokens, at least ", job.window, " are needed");
  for (int32_t id : job.tokens) {
    if (id < 0 || id >= config.vocab)
      fail("calibration: token id ", id, " is outside the model's vocabulary of ", config.vocab);
  }
  load_outer(job.checkpoint, config);
  for (int64_t l = 0; l < config.layers; ++l) load_layer(job.checkpoint, config, l);
}

void begin_progress(SparsifyJob& job) {
  // An eigenbasis and a folded layer each cost about as much as a few windows; rounding by moments walks
  // the windows twice more.
  const int64_t walks = (job.wants.moments ? 1 : 0) + (job.gptq ? 2 : 0);
  const int64_t layer_units = walks * job.windows() + (job.bases_of_weights() ? kFoldUnits : 0) +
                              (job.by_text ? kPlanUnits : 0) + kFoldUnits;
  job.progress.emplace("sparsify", job.config.layers * layer_units + kFoldUnits, job.options.progress);
}

void take_steps(SparsifyJob& job, PartialDirectory& partial) {
  check(job);
  outline_plan(job);
  partial.open();
  begin_progress(job);
  find_bases(job);
  if (job.by_text) plan_layers(job);
  write_outer(job);
  if (job.gptq) {
    round_layers(job);
  } else {
    for (int64_t l = 0; l < job.config.layers; ++l) write_layer(job, l);
  }
  write_surroundings(job);
  partial.complete();
}

void run(SparsifyJob& job) {
  PartialDirectory partial(job);
  try {
    take_steps(job, partial);
  } catch (const Error& e) {
    if (!partial.abandon()) throw;
    fail(e.what(), " (what is finished stands in ", job.partial, "; the same command resumes)");
  } catch (...) {
    partial.abandon();
    throw;
  }
}

}  // namespace

void sparsify(const SparsifyOptions& options, std::span<const int32_t> tokens, int64_t window,
              Backend& backend, ThreadPool& pool) {
  try {
    SparsifyJob job(options, tokens, window, backend, pool);
    run(job);
  } catch (const std::filesystem::filesystem_error& e) {
    fail(e.path1().string(), ": ", e.code().message());
  }
}

std::vector<int32_t> calibration_windows(std::span<const int32_t> text, int64_t window, int64_t count,
                                         const std::string& source) {
  const int64_t size = static_cast<int64_t>(text.size());
  if (size < window) fail(source, ": ", size, " tokens, calibration needs at least one window of ", window);
  count = std::clamp<int64_t>(count, 1, size / window);
  std::vector<int32_t> tokens;
  for (int64_t w = 0; w < count; ++w) {
    const int64_t first = count > 1 ? (size - window) * w / (count - 1) : 0;
    tokens.insert(tokens.end(), text.begin() + first, text.begin() + first + window);
  }
  return tokens;
}

}  // namespace larosa
