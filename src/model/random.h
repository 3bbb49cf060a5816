// Models of any shape with random weights: real sizes can be timed without downloads.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "base/thread_pool.h"
#include "model/model.h"

namespace larosa {

struct RandomOptions {
  DType weights = DType::bf16;  // of the projections: f32, f16, bf16, int8 or int4
  uint64_t seed = 1;
  std::optional<DType> adapters = {};  // else companion(weights)
  std::optional<DType> head = {};      // and the embedding's; else companion(weights)
};

/// A model of `config`'s shape in memory, projections in channels layout, read as `plan` says (its layers
/// must fit the shape; adapters and score weights are made where it asks for them, run-time bases are not:
/// Error). Values keep a vector's size about as it is, so that activations stay finite through any number of
/// layers. Equal options give equal models, whatever the thread count. Takes the bytes of
/// model_bytes.
Model make_random_model(const ModelConfig& config, const Plan& plan, const RandomOptions& options,
                        ThreadPool& pool);

/// Writes a Hugging Face directory of the shape that `config_file` (a config.json) describes: a copy of that
/// file with torch_dtype set, safetensors shards of at most `shard_bytes` each (at least one tensor) with
/// their index, and a byte-level tokenizer.json without merges. `dir` appears when it is complete, until then
/// "<dir>.partial" grows; neither may exist before. options.weights is the type of all of it, not a quantised
/// one. `progress(done, total)`, in bytes, may be empty; it may throw to stop. Throws Error for a refused
/// config, a vocabulary too small for 256 bytes, or a full disk.
void write_random_checkpoint(const std::string& config_file, const std::string& dir,
                             const RandomOptions& options, int64_t shard_bytes, ThreadPool& pool,
                             const std::function<void(int64_t done, int64_t total)>& progress);

}  // namespace larosa
