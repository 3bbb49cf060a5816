// From statistics to plans: what a layer's plan needs to know of the calibration text is found here, through
// the interpreter that runs the plan later.
#pragma once

namespace larosa {

struct Choice;
struct Method;
struct SparsifyJob;

/// True when a layer's plan depends on what reaches it.
bool plans_by_text(const Method& method, const Choice& choice);

/// Puts the layers' plans in the place of the outline's: layers one after another, each folded in float32,
/// and the text on to the next one. Cuts and greedy levels are found on the way; lagrangian levels come from
/// the curves of all layers at the end. Both are left in the job's findings and read where they stand there
/// already. Needs the bases' findings. Throws Error when a finding does not fit or the disk is full;
/// Interrupted.
void plan_layers(SparsifyJob& job);

}  // namespace larosa
