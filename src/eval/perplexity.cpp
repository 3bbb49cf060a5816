#include "eval/perplexity.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <string_view>

#include "base/error.h"
#include "base/thread_pool.h"
#include "eval/log_probabilities.h"
#include "model/decoder.h"

namespace larosa {
namespace {

constexpr std::array kProtocols = {
    Protocol{"raw", nullptr, false, false, false, 0, 2048, false, 1},
    Protocol{"larosa", "\n\n", true, true, false, 0, 2048, false, 1},
    Protocol{"hf", "\n\n", false, true, false, 0, 2048, true, 0},
    Protocol{"llama.cpp", nullptr, false, true, true, 0.5, 512, false, 2},
};

/// What one prediction contributes.
struct Score {
  double nll = 0, reference_nll = 0, kl = 0;
  bool same_top = false;
};

class Scorer {
 public:
  Scorer(const Model& model, Backend& backend, int64_t context, DType kv)
      : model_(model),
        backend_(backend),
        decoder_(model.config, backend),
        context_(context),
        kv_(kv),
        counts_(varies(model.plan)),
        hidden_(backend.allocate(context * model.config.dim * kFloat)),
        log_probabilities_(model, backend) {}

  int64_t block_rows() const { return log_probabilities_.block_rows(); }

  void run_window(std::span<const int32_t> tokens, int64_t dense_rows) {
    const ModelConfig& c = model_.config;
    const auto cache = backend_.make_kv_cache({c.layers, c.kv_heads, c.head_dim, context_, kv_});
    const int64_t rows = static_cast<int64_t>(tokens.size());
    const Mat hidden(static_cast<float*>(hidden_.get()), rows, c.dim);
    const auto first = static_cast<size_t>(std::min(dense_rows, rows));
    if (first > 0) decoder_.forward(model_, tokens.first(first), *cache, 0, Pass{true, nullptr}, hidden);
    if (first == tokens.size()) return;
    decoder_.forward(model_, tokens.subspan(first), *cache, static_cast<int64_t>(first),
                     Pass{false, nullptr, counts_ ? &tally_ : nullptr},
                     hidden.slice(static_cast<int64_t>(first), rows - static_cast<int64_t>(first)));
  }

  /// What the sparse rows so far have dropped.
  void report_reached(PerplexityResult& result) const {
    if (tally_.rows == 0) return;
    const PlanShape shape = plan_shape(model_.config);
    double read = 0, all = 0;
    std::array<double, 4> kept{}, projections{};
    for (size_t l = 0; l < tally_.kept.size(); ++l) {
      const auto& layer = tally_.kept[l];
      const bool by_outputs = model_.plan.layers[l].neurons.select != Select::all;
      for (const Projection p : kProjections) {
        const auto i = static_cast<size_t>(p), site = static_cast<size_t>(site_of(p));
        const double share = static_cast<double>(layer[i]) / static_cast<double>(tally_.rows) /
                             static_cast<double>(shape.site_dim[site]);
        read += share * static_cast<double>(shape.projection_weights[i]);
        all += static_cast<double>(shape.projection_weights[i]);
        if (by_outputs && p == Projection::up) continue;  // what up leaves out are no entries of h3
        kept[site] += share;
        projections[site] += 1;
      }
    }
    for (const LayerPlan& layer : model_.plan.layers)
      read += static_cast<double>(low_rank_weights(layer, shape));
    result.reached = 1 - read / all;
    for (size_t s = 0; s < kept.size(); ++s) result.reached_sites[s] = 1 - kept[s] / projections[s];
  }

  /// Log-probabilities after rows [first, first + count) of the window, in host memory.
  Mat log_probabilities(int64_t first, int64_t count) {
    const Mat hidden(static_cast<float*>(hidden_.get()), context_, model_.config.dim);
    return log_probabilities_.of(decoder_, hidden.slice(first, count));
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  const Model& model_;
  Backend& backend_;
  Decoder decoder_;
  int64_t context_;
  DType kv_;
  bool counts_;
  Tally tally_;
  std::shared_ptr<void> hidden_;  // backend memory
  LogProbabilities log_probabilities_;
};

Score score_row(const float* p, const float* reference, int64_t vocab, int32_t target) {
  Score score;
  score.nll = -static_cast<double>(p[target]);
  if (!reference) return score;
  score.reference_nll = -static_cast<double>(reference[target]);
  int64_t top = 0, reference_top = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (p[i] > p[top]) top = i;
    if (reference[i] > reference[reference_top]) reference_top = i;
    score.kl += static_cast<double>(std::exp(reference[i]) * (reference[i] - p[i]));
  }
  score.same_top = top == reference_top;
  return score;
}

/// The sums over all predictions and the results they give.
struct Totals {
  Sums nll, reference_nll, kl, top;

  void add(const Score& s, bool compared) {
    nll.add(s.nll);
    if (!compared) return;
    reference_nll.add(s.reference_nll);
    kl.add(s.kl);
    top.add(s.same_top ? 1 : 0);
  }
  void report(PerplexityResult& result, bool compared) const {
    result.predictions = nll.count;
    result.nll = nll.mean();
    if (!compared) return;
    result.reference_nll = reference_nll.mean();
    result.kl = kl.mean();
    result.same_top = top.mean().value;
  }
};

}  // namespace

const Protocol& find_protocol(const std::string& name) {
  std::string known;
  for (const Protocol& protocol : kProtocols) {
    if (name == protocol.name) return protocol;
    known += (known.empty() ? "" : ", ") + std::string(protocol.name);
  }
  fail("--protocol ", name, ": unknown, expected one of: ", known);
}

std::vector<int32_t> protocol_tokens(const Protocol& protocol, const Tokenizer& tokenizer,
                                     const std::string& text) {
  if (!protocol.row_end) return tokenizer.encode(text, protocol.leading_special);
  std::string joined;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    if (line.find_first_not_of(" \t\r\v\f") != std::string_view::npos) joined.append(line) += '\n';
    begin = end + 1;
    if (begin < text.size() || protocol.ends_rows) joined += protocol.row_end;
  }
  return tokenizer.encode(joined, protocol.leading_special);
}

PerplexityResult perplexity(const Model& model, const Model* reference, Backend& backend, ThreadPool& pool,
                            std::span<const int32_t> tokens, const PerplexityOptions& options,
                            const std::function<void(const PerplexityResult&, int64_t)>& seen) {
  const int64_t context = options.context, vocab = model.config.vocab;
  const int64_t size = static_cast<int64_t>(tokens.size());
  const int64_t stride = options.stride > 0 ? options.stride : context;
  if (stride > context) fail("--stride ", stride, ": expected at most the window's ", context, " tokens");
  int64_t windows = size < context ? 0 : (size - context) / stride + 1;
  // One more for what stands behind the last whole window, if it holds a prediction.
  const int64_t covered = windows == 0 ? 0 : (windows - 1) * stride + context;
  if (options.last_window && size - std::max<int64_t>(covered, 1) > 0 && size - windows * stride > 1)
    ++windows;
  if (windows < 1) fail("the text has ", size, " tokens, one window needs ", context);
  if (options.most_windows > 0) windows = std::min(windows, options.most_windows);
  const double unscored = std::max(options.dense_prompt, options.skipped_share);
  if (static_cast<int64_t>(unscored * static_cast<double>(context)) + 1 >= context)
    fail("nothing is left to score: ", unscored, " of each window of ", context, " tokens is not");
  if (reference && reference->config.vocab != vocab) {
    fail("--against: its vocabulary has ", reference->config.vocab, " tokens, the model's ", vocab);
  }
  for (int32_t id : tokens) {
    if (id < 0 || id >= vocab) fail("token id ", id, " is outside the model's vocabulary of ", vocab);
  }
  Scorer scorer(model, backend, context, options.kv);
  std::unique_ptr<Scorer> other;
  if (reference) other = std::make_unique<Scorer>(*reference, backend, context, DType::f32);

  PerplexityResult result;
  Totals totals;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t w = 0; w < windows; ++w) {
    const int64_t begin_token = w * stride, length = std::min(context, size - begin_token);
    std::vector<int32_t> window(tokens.begin() + begin_token, tokens.begin() + begin_token + length);
    if (options.bos >= 0) window[0] = options.bos;
    const auto share = [length](double part) {
      return static_cast<int64_t>(part * static_cast<double>(length));
    };
    const int64_t dense_rows = share(options.dense_prompt);
    // Rows whose prediction an earlier window has scored.
    const int64_t seen_before = w == 0 ? 0 : context - stride - 1;
    const int64_t skipped = std::max({dense_rows, share(options.skipped_share), seen_before});
    scorer.run_window(window, dense_rows);
    if (other) other->run_window(window, 0);
    for (int64_t first = skipped; first + 1 < length; first += scorer.block_rows()) {
      const int64_t count = std::min(scorer.block_rows(), length - 1 - first);
      const Mat p = scorer.log_probabilities(first, count);
      const Mat q = other ? other->log_probabilities(first, count) : Mat();
      std::vector<Score> scores(static_cast<size_t>(count));
      pool.split(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int32_t target = window[static_cast<size_t>(first + t + 1)];
          scores[static_cast<size_t>(t)] = score_row(p.row(t), other ? q.row(t) : nullptr, vocab, target);
        }
      });
      for (const Score& s : scores) totals.add(s, reference != nullptr);
    }
    result.windows = w + 1;
    result.tokens += length;
    totals.report(result, reference != nullptr);
    scorer.report_reached(result);
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    seen(result, windows);
  }
  return result;
}

}  // namespace larosa
