// TEAL (arXiv 2408.14690): every projection drops what is not above its own cut, the quantile of |x| on the
// calibration text (counted, without TEAL's assumption of a symmetric density).
#include "calib/methods.h"

namespace larosa {
namespace {

LayerPlan plan(const LayerTask& task) {
  LayerPlan layer;
  for (const Projection p : kProjections) {
    Rule rule;
    rule.select = Select::threshold;
    const int64_t dim = projection_in(task.config, p);
    const double level = task.levels[static_cast<size_t>(p)];
    rule.keep = keep_of(dim, level);
    if (task.magnitudes) {
      const Magnitudes& seen = task.magnitudes->sites[static_cast<size_t>(site_of(p))];
      rule.cut = seen.quantile(level);
      rule.keep = keep_of(dim, 1.0 - seen.share_above(rule.cut));
    }
    layer.groups.push_back({{p}, rule});
  }
  return layer;
}

}  // namespace

extern const Method kTeal;
const Method kTeal = {"teal", "a fixed cut per projection, from the calibration's quantiles",
                      [](const Choice&) { return Wants{.magnitudes = true}; },
                      [](const BasisTask&) { return Bases{}; }, plan};

}  // namespace larosa
