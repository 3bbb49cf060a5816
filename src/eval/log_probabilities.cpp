#include "eval/log_probabilities.h"

#include <algorithm>

#include "base/error.h"

namespace larosa {

LogProbabilities::LogProbabilities(const Model& model, Backend& backend)
    : model_(model),
      backend_(backend),
      block_rows_(std::clamp<int64_t>((int64_t{1} << 25) / model.config.vocab, 16, 256)),
      logits_(backend.allocate(block_rows_ * model.config.vocab * static_cast<int64_t>(sizeof(float)))),
      host_(static_cast<size_t>(block_rows_ * model.config.vocab)) {}

Mat LogProbabilities::of(Decoder& decoder, Mat hidden) {
  CHECK(hidden.rows <= block_rows_);
  const Mat logits(static_cast<float*>(logits_.get()), hidden.rows, model_.config.vocab);
  decoder.logits(model_, hidden, logits);
  backend_.log_softmax(logits);
  backend_.read(logits, host_.data());
  return Mat(host_.data(), hidden.rows, model_.config.vocab);
}

}  // namespace larosa
