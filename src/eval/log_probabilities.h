// From hidden states to log-probabilities on the host.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/decoder.h"
#include "model/model.h"

namespace larosa {

class LogProbabilities {
 public:
  LogProbabilities(const Model& model, Backend& backend);

  /// Rows that are held at once: a vocabulary of 128 k stays below 128 MiB.
  int64_t block_rows() const { return block_rows_; }
  /// (T, vocab) in host memory, until the next call, of hidden (T, dim) in backend memory; T ≤ block_rows.
  Mat of(Decoder& decoder, Mat hidden);

 private:
  const Model& model_;
  Backend& backend_;
  int64_t block_rows_;
  std::shared_ptr<void> logits_;  // backend memory
  std::vector<float> host_;
};

}  // namespace larosa
