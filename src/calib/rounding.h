// Quantising by what weights are multiplied with, layer after layer; how one weight is rounded: gptq.h.
#pragma once

namespace larosa {

struct SparsifyJob;

/// Writes the shards of all layers: the text, as the finished layers before pass it on, goes through the
/// folded layer in float32, which is then rounded for what its projections have read. Needs shard 0
/// (write_outer). Throws Error when moments or weights are not finite or the disk is full; Interrupted.
void round_layers(SparsifyJob& job);

}  // namespace larosa
