// Log-likelihoods of continuations, as lm-evaluation-harness's Hugging Face model defines them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "eval/log_probabilities.h"
#include "model/decoder.h"
#include "model/model.h"
#include "text/tokenizer.h"

namespace larosa {

class ThreadPool;

/// What is scored: log p(continuation | context). Valid UTF-8.
struct Request {
  std::string context, continuation;
};

/// A request as tokens, cut to what the model can see. Neither is empty.
struct EncodedRequest {
  std::vector<int32_t> context, continuation;
};

/// The tokens of both texts together, split behind as many as the context has alone; white space at the
/// context's end belongs to the continuation; an empty context is the token that starts (else ends) a text.
/// Of more than window + 1 tokens the first are dropped. Throws Error, which starts with `source`, when
/// nothing is left to score or to score it after.
EncodedRequest encode_request(const Tokenizer& tokenizer, const Request& request, int64_t window,
                              const std::string& source);

struct Likelihood {
  double log = 0;       // Σ log p(token | what stands before it), nats
  bool greedy = false;  // every token is the most likely one (among equals the one of lowest id)
};

/// The requests of one question.
using Question = std::vector<EncodedRequest>;

class LikelihoodScorer {
 public:
  /// Keeps keys and values, as many as the longest request needs, in `kv`. All must outlive the scorer.
  LikelihoodScorer(const Model& model, Backend& backend, ThreadPool& pool, DType kv);

  /// Rows that scoring a question runs: neighbours with one context share it.
  static int64_t rows_of(const Question& question);
  /// The likelihoods of every question's requests. All questions are run at once: the more rows, the less
  /// often the weights are read. Throws Error for ids outside the vocabulary.
  std::vector<std::vector<Likelihood>> score(std::span<const Question> questions);

 private:
  struct Batch;

  const Model& model_;
  Backend& backend_;
  ThreadPool& pool_;
  Decoder decoder_;
  DType kv_;
  std::unique_ptr<KvCache> cache_;  // grows with the longest request: a backend may take all of it at once
  int64_t positions_ = 0;           // of cache_
  LogProbabilities log_probabilities_;
  std::shared_ptr<void> hidden_;  // backend memory, grows with the largest batch
  int64_t capacity_ = 0;          // rows of hidden_
};

}  // namespace larosa
