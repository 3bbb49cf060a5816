// The bases that layers are thinned in: principal components of what the calibration text brings to each
// layer of the dense model, or of the weights alone.
#pragma once

namespace larosa {

struct SparsifyJob;

/// Writes the bases of every layer to the job's findings, where they do not stand there yet. Layers that
/// share the stream's basis are done together. Throws Error when moments are not finite or the disk is full;
/// Interrupted.
void find_bases(SparsifyJob& job);

}  // namespace larosa
