// CATS (arXiv 2404.08763): neurons of the feed-forward whose |a(gate)| is not above a cut, the quantile on
// the calibration text, are left out of up and down. Attention and gate are read whole, so that the whole
// budget falls to up and down.
#include "base/error.h"
#include "calib/methods.h"

namespace larosa {
namespace {

/// Share of the projections' weights that up and down have.
double share_of_neurons(const ModelConfig& config) {
  const double both = static_cast<double>(2 * config.dim * config.ffn);
  return both / static_cast<double>(layer_weights(config));
}

LayerPlan plan(const LayerTask& task) {
  if (task.choice.allocation != Allocation::uniform || task.choice.site_scale != Choice{}.site_scale)
    fail("method cats has one level for the neurons of all layers: no --allocation, no --site-scale");
  const double share = share_of_neurons(task.config), level = task.choice.sparsity / share;
  if (level > kMostSparse)
    fail("--sparsity ", task.choice.sparsity, ": method cats thins up and down alone, ", share,
         " of this model's weights, expected at most ", kMostSparse * share);
  Rule rule;
  rule.select = Select::threshold;
  rule.keep = keep_of(task.config.ffn, level);
  if (task.magnitudes) {
    rule.cut = task.magnitudes->neurons.quantile(level);
    rule.keep = keep_of(task.config.ffn, 1.0 - task.magnitudes->neurons.share_above(rule.cut));
  }
  LayerPlan layer = dense_layer();
  layer.neurons = rule;
  rule.cut = 0;  // down skips what is zero
  layer.groups.back().rule = rule;
  return layer;
}

}  // namespace

extern const Method kCats;
const Method kCats = {"cats", "neurons with a small gate are left out of up and down",
                      [](const Choice&) { return Wants{.magnitudes = true}; },
                      [](const BasisTask&) { return Bases{}; }, plan};

}  // namespace larosa
