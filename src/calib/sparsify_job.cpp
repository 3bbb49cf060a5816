#include "calib/sparsify_job.h"

#include "calib/planner.h"
#include "io/files.h"

namespace larosa {

SparsifyJob::SparsifyJob(const SparsifyOptions& options_, std::span<const int32_t> tokens_, int64_t window_,
                         Backend& backend_, ThreadPool& pool_)
    : options(options_),
      tokens(tokens_),
      window(window_),
      backend(backend_),
      algebra(backend.make_algebra(pool_)),
      pool(pool_),
      config(load_config(options.source)),
      checkpoint(Checkpoint::open(options.source)),
      method(find_method(options.method)),
      choice(options.choice),
      wants(method.wants(choice)),
      by_text(plans_by_text(method, choice)),
      gptq(options.gptq && options.types.weights && quantised(*options.types.weights)),
      output(vacant_path(options.output)),
      partial(output + ".partial"),
      findings(partial, options.kept.empty() ? partial : options.kept) {}

void SparsifyJob::tick(int64_t units, const std::string& note) {
  throw_if_interrupted();
  progress->update(done += units, note);
}

std::string SparsifyJob::layer_note(const char* doing, int64_t l) const {
  return doing + (" layer " + std::to_string(l + 1)) + "/" + std::to_string(config.layers);
}

void SparsifyJob::release(const Weight& weight) const {
  Tensor tensor;
  tensor.data = static_cast<const std::byte*>(weight.data);
  tensor.bytes = weight.bytes();
  checkpoint.release(tensor);
}

void SparsifyJob::release_layer(int64_t l) const {
  const LayerWeights weights = load_layer(checkpoint, config, l);
  for (const Weight& w : weights.projection) release(w);
}

}  // namespace larosa
