// One timeline of a loaded model: a prompt goes in, tokens come out one by one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/decoder.h"
#include "model/model.h"

namespace larosa {

class Session {
 public:
  /// Room for `context` tokens (at most the model's). model and backend must outlive the session. kv: f32 or
  /// f16.
  Session(const Model& model, Backend& backend, int64_t context, DType kv);

  /// Takes tokens in and makes the logits after the last one. Throws Error for an empty list, ids outside the
  /// vocabulary, or more tokens than there is room for. `dense`: every channel is read, whatever the plan
  /// says.
  void feed(std::span<const int32_t> tokens, bool dense);
  /// Logits after the last token. // (vocab)
  std::span<const float> logits() const { return logits_; }
  /// Tokens so far.
  std::span<const int32_t> tokens() const { return tokens_; }
  int64_t room() const { return context_ - static_cast<int64_t>(tokens_.size()); }

 private:
  const Model& model_;
  Backend& backend_;
  int64_t context_;
  Decoder decoder_;
  std::unique_ptr<KvCache> cache_;
  std::vector<int32_t> tokens_;
  std::vector<float> hidden_, logits_;
};

}  // namespace larosa
