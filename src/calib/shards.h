// The files of a sparsified model (docs/formats.md): a shard per layer, one for what stands outside the
// layers, and what surrounds them. All are written to the job's partial directory, each under a temporary
// name first.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include "calib/fold.h"

namespace larosa {

struct SparsifyJob;

/// Shard 0 holds embedding, head and the plan, shard l + 1 layer l.
std::filesystem::path shard_path(const SparsifyJob& job, int64_t index);
std::map<std::string, std::string> shard_metadata(const SparsifyJob& job);

/// Where the layer that is being planned or rounded stands in float32; none when both are done.
std::filesystem::path folded_path(const SparsifyJob& job);

/// Layer l as the plan says, folded, with its projections in `types.weights`, and products of low rank in a
/// type of their own where one is given. Needs the findings of its
/// bases, and of the next layer's where an adapter leads there. Throws Error when the disk is full or a value
/// cannot be quantised; Interrupted.
void fold_to(const std::filesystem::path& path, const SparsifyJob& job, int64_t l, const StoredTypes& types,
             std::optional<DType> low_rank_type = {});

/// Layer l's shard, rounded to nearest, where it does not stand there yet. Throws as fold_to.
void write_layer(SparsifyJob& job, int64_t l);

/// Shard 0: embedding (vocab, dim), head where it is not the embedding, final norm's gain where the head does
/// not take it, the plan. Throws as fold_to.
void write_outer(SparsifyJob& job);

/// The index of all shards, which must be whole, the config with a `larosa` section, and the source's
/// tokenizer.
void write_surroundings(const SparsifyJob& job);

}  // namespace larosa
