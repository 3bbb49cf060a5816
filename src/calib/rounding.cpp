#include "calib/rounding.h"

#include <filesystem>
#include <set>

#include "calib/gptq.h"
#include "calib/shards.h"
#include "calib/sparsify_job.h"
#include "calib/statistics.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

constexpr double kRoundingDamping = 0.01;  // of the mean moment, as GPTQ's

/// Of what each group of layer l, which stands in `file`, reads.
std::vector<Matrix> read_moments(SparsifyJob& job, Calibration& calibration, const Checkpoint& file,
                                 int64_t l) {
  Layer layer = load_stored_layer(file, job.config, job.plan.layers[static_cast<size_t>(l)], l);
  const auto memory = place(layer, job.config, job.backend);
  return calibration.read_moments(layer, l, [&] { job.tick(1, job.layer_note("rounding", l)); });
}

/// Tensors of the folded layer that were not rounded, as they are.
void copy_others(const Checkpoint& file, std::vector<FoldedTensor>& tensors) {
  std::set<std::string> there;
  for (const FoldedTensor& t : tensors) there.insert(t.name);
  for (const std::string& name : file.names()) {
    if (there.contains(name)) continue;
    const auto bytes = file.find_bytes(name);
    const Tensor t = bytes ? *bytes : *file.find(name);
    tensors.push_back({name, t.dtype, t.shape, std::vector<std::byte>(t.data, t.data + t.bytes)});
  }
}

void round_layer(SparsifyJob& job, Calibration& calibration, const fs::path& path, int64_t l) {
  const fs::path folded = folded_path(job);
  StoredTypes types = job.options.types;
  types.weights = DType::f32;
  fold_to(folded, job, l, types, job.options.types.weights);
  std::vector<FoldedTensor> tensors;
  {
    const Checkpoint file = Checkpoint::open_file(folded.string());
    const Layer layer = load_stored_layer(file, job.config, job.plan.layers[static_cast<size_t>(l)], l);
    auto moments = read_moments(job, calibration, file, l);
    for (size_t g = 0; g < moments.size(); ++g) {
      const RoundingFactor factor = rounding_factor(std::move(moments[g]), kRoundingDamping, *job.algebra);
      for (const Projection p : layer.plan.groups[g].projections) {
        const std::string name = "layers." + std::to_string(l) + "." + projection_name(p);
        tensors.push_back(
            round_by_moments(name, layer.weights[p], *job.options.types.weights, factor, job.pool));
      }
    }
    copy_others(file, tensors);
  }
  write_tensors(path, tensors, shard_metadata(job));
  fs::remove(folded);
}

}  // namespace

void round_layers(SparsifyJob& job) {
  const ModelConfig& config = job.config;
  const Checkpoint outer_file = Checkpoint::open_file(shard_path(job, 0).string());
  const OuterWeights outer = load_stored_outer(outer_file, config);
  Calibration calibration(outer, config, job.backend, *job.algebra, job.tokens, job.window);
  for (int64_t l = 0; l < config.layers; ++l) {
    const fs::path path = shard_path(job, l + 1);
    const std::string note = job.layer_note("rounding", l);
    if (fs::exists(path)) {
      job.tick(job.windows(), note);
    } else {
      round_layer(job, calibration, path, l);
    }
    job.tick(kFoldUnits, note);
    if (l + 1 == config.layers) return job.tick(job.windows(), note);
    const Checkpoint file = Checkpoint::open_file(path.string());
    Layer layer = load_stored_layer(file, config, job.plan.layers[static_cast<size_t>(l)], l);
    const auto memory = place(layer, config, job.backend);
    calibration.walk(layer, l, Pass{}, [&] { job.tick(1, job.layer_note("passing", l)); });
  }
}

}  // namespace larosa
