#include "engine/session.h"

#include <algorithm>

#include "base/error.h"

namespace larosa {

Session::Session(const Model& model, Backend& backend, int64_t context, DType kv)
    : model_(model),
      backend_(backend),
      context_(context),
      decoder_(model.config, backend),
      hidden_(static_cast<size_t>(Decoder::kBatch * model.config.dim)),
      logits_(static_cast<size_t>(model.config.vocab)) {
  const ModelConfig& c = model.config;
  if (context < 1 || context > c.context)
    fail("-c ", context, ": expected 1 to the model's context of ", c.context);
  cache_ = backend.make_kv_cache({c.layers, c.kv_heads, c.head_dim, context, kv});
}

void Session::feed(std::span<const int32_t> tokens, bool dense) {
  if (tokens.empty()) fail("the prompt is empty");
  if (static_cast<int64_t>(tokens.size()) > room()) {
    fail("the prompt has ", tokens.size(), " tokens, the context has room for ", room());
  }
  for (int32_t id : tokens) {
    if (id < 0 || id >= model_.config.vocab)
      fail("token id ", id, " is outside the model's vocabulary of ", model_.config.vocab);
  }
  const Pass pass{dense, nullptr};
  int64_t rows = 0;
  for (size_t first = 0; first < tokens.size(); first += static_cast<size_t>(rows)) {
    rows = std::min(Decoder::kBatch, static_cast<int64_t>(tokens.size() - first));
    const auto part = tokens.subspan(first, static_cast<size_t>(rows));
    const Mat hidden(hidden_.data(), rows, model_.config.dim);
    decoder_.forward(model_, part, *cache_, static_cast<int64_t>(tokens_.size()), pass, hidden);
    tokens_.insert(tokens_.end(), part.begin(), part.end());
  }
  decoder_.logits(model_, Mat(hidden_.data(), rows, model_.config.dim).slice(rows - 1, 1),
                  Mat(logits_.data(), 1, model_.config.vocab));
}

}  // namespace larosa
