#include "calib/bases.h"

#include <initializer_list>
#include <utility>
#include <vector>

#include "calib/matrix.h"
#include "calib/sparsify_job.h"
#include "calib/statistics.h"

namespace larosa {
namespace {

/// Adds the Gram matrices of layer l's weights, as they read what the moments are of: gains are merged unless
/// they come before it.
void add_grams(const SparsifyJob& job, int64_t l, Moments& moments) {
  using enum Projection;
  const LayerWeights w = load_layer(job.checkpoint, job.config, l);  // place() may have moved the layer's own
  const auto add = [&](std::initializer_list<Projection> readers, const float* gain, Matrix& gram) {
    if (gram.empty()) gram = Matrix(job.config.dim, job.config.dim);
    for (const Projection p : readers)
      add_gram(w[p], job.choice.after_gain ? nullptr : gain, gram, *job.algebra);
  };
  add({wq, wk, wv}, w.norm_attn, moments.g1);
  add({gate, up}, w.norm_mlp, moments.g3);
}

/// Bases of the layers up to `last`, which share the stream's moments.
void write_group(const SparsifyJob& job, int64_t last, std::vector<Moments>& group) {
  const auto add = [](Matrix& sum, const Matrix& m) {
    for (size_t i = 0; i < m.data.size(); ++i) sum.data[i] += m.data[i];
  };
  for (size_t i = 1; i < group.size(); ++i) {
    add(group[0].h1, group[i].h1);
    add(group[0].h3, group[i].h3);
  }
  const int64_t first = last + 1 - static_cast<int64_t>(group.size());
  Bases shared;
  for (int64_t l = first; l <= last; ++l) {
    std::swap(group[0].heads, group[static_cast<size_t>(l - first)].heads);
    const LayerWeights weights = load_layer(job.checkpoint, job.config, l);
    Bases bases = job.method.bases({job.config, job.choice, weights, group[0], *job.algebra});
    if (l == first) {
      shared.stream = bases.stream;
      shared.mlp = bases.mlp;
      for (Matrix* m : {&group[0].h1, &group[0].h3, &group[0].g1, &group[0].g3}) *m = Matrix();
    }
    bases.stream = shared.stream;
    bases.mlp = shared.mlp;
    job.findings.write_bases(l, bases);
  }
}

/// From the dense model's moments, layer after layer; layers that share them at the last one's.
void from_moments(SparsifyJob& job) {
  const ModelConfig& config = job.config;
  int64_t finished = 0;
  while (finished < config.layers && job.findings.has_bases(finished)) ++finished;
  if (finished == config.layers) return job.tick(config.layers * job.windows(), "calibration found");
  while (finished > 0 && !ends_basis(config, job.choice, finished - 1)) --finished;
  Calibration calibration(load_outer(job.checkpoint, config), config, job.backend, *job.algebra, job.tokens,
                          job.window);
  std::vector<Moments> group;  // of the layers since the last basis ended
  for (int64_t l = 0; l < config.layers; ++l) {
    // Layers whose basis is stored only carry the text on to the next one.
    const Wants wants = l < finished ? Wants{} : job.wants;
    const std::string note = job.layer_note("calibrating", l);
    Layer layer;
    layer.weights = load_layer(job.checkpoint, config, l);
    layer.groups.resize(layer.plan.groups.size());
    const auto memory = place(layer, config, job.backend);
    group.push_back(calibration.moments(layer, l, wants, job.choice, [&] { job.tick(1, note); }));
    if (l >= finished && job.choice.basis_weights > 0) add_grams(job, l, group.front());
    job.release_layer(l);
    if (!ends_basis(config, job.choice, l)) continue;
    if (l >= finished) write_group(job, l, group);
    group.clear();
  }
}

void from_weights(SparsifyJob& job) {
  for (int64_t l = 0; l < job.config.layers; ++l) {
    const LayerWeights weights = load_layer(job.checkpoint, job.config, l);
    if (!job.findings.has_bases(l))
      job.findings.write_bases(l,
                               job.method.bases({job.config, job.choice, weights, Moments{}, *job.algebra}));
    job.tick(kFoldUnits, job.layer_note("basis of", l));
  }
}

}  // namespace

void find_bases(SparsifyJob& job) {
  if (job.wants.moments) from_moments(job);
  if (job.bases_of_weights()) from_weights(job);
}

}  // namespace larosa
