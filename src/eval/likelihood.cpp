#include "eval/likelihood.h"

#include <algorithm>

#include "base/error.h"
#include "base/thread_pool.h"
#include "text/unicode.h"

namespace larosa {
namespace {

using Tokens = std::vector<int32_t>;

/// What tokenizers add (a BOS) is added unless the text already starts with it.
Tokens encode(const Tokenizer& tokenizer, const std::string& text) {
  const TokenId prefix = tokenizer.bos() >= 0 ? tokenizer.bos() : tokenizer.eos();
  const bool there = prefix >= 0 && text.starts_with(tokenizer.decode(std::span(&prefix, 1), false));
  return tokenizer.encode(text, !there);
}

EncodedRequest encode_after_nothing(const Tokenizer& tokenizer, const std::string& continuation,
                                    const std::string& source) {
  const TokenId prefix = tokenizer.bos() >= 0 ? tokenizer.bos() : tokenizer.eos();
  Tokens tokens = tokenizer.encode(continuation, false);
  if (prefix < 0 && tokens.size() < 2)
    fail(source, ": the context is empty and the tokenizer names no BOS or EOS");
  if (prefix >= 0 && (tokens.empty() || tokens[0] != prefix)) tokens.insert(tokens.begin(), prefix);
  return {{tokens[0]}, {tokens.begin() + 1, tokens.end()}};
}

}  // namespace

EncodedRequest encode_request(const Tokenizer& tokenizer, const Request& request, int64_t window,
                              const std::string& source) {
  EncodedRequest e;
  const std::string context(stripped_right(request.context));
  if (request.context.empty()) {
    e = encode_after_nothing(tokenizer, request.continuation, source);
  } else {
    const Tokens whole = encode(tokenizer, request.context + request.continuation);
    e.context = encode(tokenizer, context);
    const size_t split = std::min(e.context.size(), whole.size());
    e.continuation.assign(whole.begin() + static_cast<std::ptrdiff_t>(split), whole.end());
  }
  if (e.context.empty()) fail(source, ": the context has no token");
  if (e.continuation.empty()) fail(source, ": the continuation has no token of its own");
  const auto length = static_cast<int64_t>(e.continuation.size());
  if (length > window)
    fail(source, ": the continuation has ", length, " tokens, the model's context ", window);
  const int64_t extra = static_cast<int64_t>(e.context.size()) + length - (window + 1);
  if (extra > 0) e.context.erase(e.context.begin(), e.context.begin() + extra);
  return e;
}

/// Where the rows of a batch lie and what they predict.
struct LikelihoodScorer::Batch {
  struct Prediction {
    int64_t row;
    int32_t target;
    size_t request;  // counted over all questions
  };
  /// Rows [first, first + rows) predict something.
  struct Run {
    int64_t first, rows;
    std::vector<Prediction> predictions;  // by row
  };

  Tokens tokens;
  std::vector<Segment> segments;
  std::vector<Run> runs;
  size_t requests = 0;

  void add(const Tokens& part, size_t count, int64_t pos) {
    tokens.insert(tokens.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(count));
    segments.push_back({static_cast<int64_t>(count), pos});
  }

  /// Requests with the same context: the context's rows, then those of each continuation but for its last
  /// token. The context's last row predicts the first token of each.
  void add(std::span<const EncodedRequest> group) {
    const Tokens& context = group[0].context;
    const auto length = static_cast<int64_t>(context.size());
    add(context, context.size(), 0);
    Run run{static_cast<int64_t>(tokens.size()) - 1, 0, {}};
    for (size_t i = 0; i < group.size(); ++i)
      run.predictions.push_back({run.first, group[i].continuation[0], requests + i});
    for (size_t i = 0; i < group.size(); ++i) {
      const Tokens& continuation = group[i].continuation;
      auto row = static_cast<int64_t>(tokens.size());
      for (size_t t = 1; t < continuation.size(); ++t)
        run.predictions.push_back({row++, continuation[t], requests + i});
      if (continuation.size() > 1) add(continuation, continuation.size() - 1, length);
    }
    run.rows = static_cast<int64_t>(tokens.size()) - run.first;
    runs.push_back(std::move(run));
    requests += group.size();
  }
};

namespace {

/// Calls body(requests that share a context) for every such stretch of a question.
template <class Body>
void each_group(const Question& question, const Body& body) {
  for (size_t first = 0, next = 0; first < question.size(); first = next) {
    for (next = first + 1; next < question.size() && question[next].context == question[first].context;)
      ++next;
    body(std::span(question).subspan(first, next - first));
  }
}

Likelihood likelihood_of(const float* p, int64_t vocab, int32_t target) {
  bool greedy = true;
  for (int64_t v = 0; v < vocab && greedy; ++v)
    greedy = p[v] < p[target] || (p[v] == p[target] && v >= target);
  return {static_cast<double>(p[target]), greedy};
}

}  // namespace

LikelihoodScorer::LikelihoodScorer(const Model& model, Backend& backend, ThreadPool& pool, DType kv)
    : model_(model),
      backend_(backend),
      pool_(pool),
      decoder_(model.config, backend),
      kv_(kv),
      log_probabilities_(model, backend) {}

int64_t LikelihoodScorer::rows_of(const Question& question) {
  size_t rows = 0;
  each_group(question, [&](std::span<const EncodedRequest> group) {
    rows += group[0].context.size();
    for (const EncodedRequest& e : group) rows += e.continuation.size() - 1;
  });
  return static_cast<int64_t>(rows);
}

std::vector<std::vector<Likelihood>> LikelihoodScorer::score(std::span<const Question> questions) {
  const int64_t dim = model_.config.dim, vocab = model_.config.vocab;
  Batch batch;
  for (const Question& q : questions) {
    for (const EncodedRequest& e : q) {
      for (const Tokens* part : {&e.context, &e.continuation})
        for (int32_t id : *part)
          if (id < 0 || id >= vocab) fail("token id ", id, " is outside the model's vocabulary of ", vocab);
    }
    each_group(q, [&](std::span<const EncodedRequest> group) { batch.add(group); });
  }
  std::vector<std::vector<Likelihood>> result;
  const auto rows = static_cast<int64_t>(batch.tokens.size());
  if (rows > capacity_) {
    hidden_.reset();
    hidden_ = backend_.allocate(rows * dim * static_cast<int64_t>(sizeof(float)));
    capacity_ = rows;
  }
  const ModelConfig& config = model_.config;
  const auto longest = std::ranges::max_element(batch.segments, {}, &Segment::end);
  if (longest != batch.segments.end() && longest->end() > positions_) {
    positions_ = std::min(config.context, std::max(longest->end(), 2 * positions_));
    cache_.reset();
    cache_ = backend_.make_kv_cache({config.layers, config.kv_heads, config.head_dim, positions_, kv_});
  }
  const Mat hidden(static_cast<float*>(hidden_.get()), rows, dim);
  decoder_.forward(model_, batch.tokens, *cache_, batch.segments, Pass{}, hidden);

  std::vector<Likelihood> sums(batch.requests, Likelihood{0, true});
  std::vector<Likelihood> found;
  for (const Batch::Run& run : batch.runs) {
    found.resize(run.predictions.size());
    size_t next = 0;
    for (int64_t first = 0; first < run.rows; first += log_probabilities_.block_rows()) {
      const int64_t count = std::min(log_probabilities_.block_rows(), run.rows - first);
      const Mat p = log_probabilities_.of(decoder_, hidden.slice(run.first + first, count));
      const size_t begin = next;
      while (next < found.size() && run.predictions[next].row < run.first + first + count) ++next;
      pool_.split(static_cast<int64_t>(next - begin), 1, [&](int64_t a, int64_t b) {
        for (auto i = begin + static_cast<size_t>(a); i < begin + static_cast<size_t>(b); ++i) {
          const auto& [row, target, request] = run.predictions[i];
          found[i] = likelihood_of(p.row(row - run.first - first), vocab, target);
        }
      });
    }
    for (size_t i = 0; i < found.size(); ++i) {
      Likelihood& sum = sums[run.predictions[i].request];
      sum.log += found[i].log;
      sum.greedy = sum.greedy && found[i].greedy;
    }
  }
  auto sum = sums.begin();
  for (const Question& q : questions) {
    result.emplace_back(sum, sum + static_cast<std::ptrdiff_t>(q.size()));
    sum += static_cast<std::ptrdiff_t>(q.size());
  }
  return result;
}

}  // namespace larosa
