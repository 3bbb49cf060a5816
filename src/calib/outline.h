// The plan before anything was measured: layers at uniform levels, everything else as it will be.
#pragma once

namespace larosa {

struct SparsifyJob;

/// Writes the job's plan, notes included; where adapters count as read, raises the sparsity of its choice by
/// their share of the projections' bytes. Throws Error when that is more than can be dropped.
void outline_plan(SparsifyJob& job);

}  // namespace larosa
