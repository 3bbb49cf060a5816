#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "engine/engine_data.h"
#include "engine/sampler.h"
#include "model/decoder.h"

namespace larosa {

struct Session::Data {
  Data(const Engine::Data& from, const SessionOptions& o)
      : engine(from),
        options(o),
        decoder(from.model.config, *from.backend),
        sampler(o.sampling),
        hidden(floats(*from.backend, Decoder::kBatch * from.model.config.dim)),
        scores(floats(*from.backend, from.model.config.vocab)) {
    const ModelConfig& c = from.model.config;
    context = o.context == 0 ? c.context : o.context;
    if (context < 1 || context > c.context)
      fail("-c ", context, ": expected 1 to the model's context of ", c.context);
    cache = from.backend->make_kv_cache({c.layers, c.kv_heads, c.head_dim, context, kv_dtype(o.kv)});
  }

  static std::shared_ptr<void> floats(Backend& backend, int64_t n) {
    return backend.allocate(n * static_cast<int64_t>(sizeof(float)));
  }
  Mat hidden_rows(int64_t rows) const {
    return Mat(static_cast<float*>(hidden.get()), rows, engine.model.config.dim);
  }
  Mat scores_row() const { return Mat(static_cast<float*>(scores.get()), 1, engine.model.config.vocab); }

  bool cancelled() const { return options.cancelled && options.cancelled(); }

  /// Runs all tokens that have not been through the model yet: a prompt's, the one drawn last. May be stopped
  /// between batches and goes on from there.
  void evaluate() {
    const Model& model = engine.model;
    int64_t rows = 0;
    while (evaluated < tokens.size()) {
      if (cancelled()) return;
      const bool prompt = evaluated < prompt_end;
      const size_t end = prompt ? prompt_end : tokens.size();
      const bool dense = prompt && !options.sparse_prompt;
      rows = std::min(Decoder::kBatch, static_cast<int64_t>(end - evaluated));
      const auto part = std::span<const int32_t>(tokens).subspan(evaluated, static_cast<size_t>(rows));
      const Mat h = hidden_rows(rows);
      decoder.forward(model, part, *cache, static_cast<int64_t>(evaluated), Pass{dense, nullptr}, h);
      evaluated += part.size();
    }
    if (rows > 0) decoder.logits(model, hidden_rows(rows).slice(rows - 1, 1), scores_row());
  }
  /// Then the scores are those after the last token.
  void finish() {
    if (tokens.empty()) fail("the prompt is empty");
    evaluate();
    if (evaluated < tokens.size()) fail("cancelled");
  }

  /// All scores, on the host.
  std::span<const float> read_logits() {
    if (logits_after != evaluated) {
      logits.resize(static_cast<size_t>(engine.model.config.vocab));
      engine.backend->read(scores_row(), logits.data());
      logits_after = evaluated;
    }
    return logits;
  }

  int32_t draw() {
    const auto vocab = static_cast<size_t>(engine.model.config.vocab);
    candidates.resize(sampler.wanted(vocab, tokens));
    if (candidates.size() < vocab) {
      engine.backend->largest(scores_row(), candidates);
    } else {  // whose order the sampler makes
      const auto all = read_logits();
      for (size_t i = 0; i < vocab; ++i) candidates[i] = {all[i], static_cast<int32_t>(i)};
    }
    return sampler.next(candidates, tokens);
  }

  const Engine::Data& engine;
  SessionOptions options;
  int64_t context = 0;
  Decoder decoder;
  Sampler sampler;
  std::unique_ptr<KvCache> cache;
  std::vector<int32_t> tokens;
  size_t evaluated = 0;                  // of tokens
  size_t prompt_end = 0;                 // tokens before it and not evaluated are a prompt's
  std::shared_ptr<void> hidden, scores;  // backend memory
  std::vector<Candidate> candidates;
  std::vector<float> logits;  // the scores once they have been asked for,
  size_t logits_after = 0;    // after so many tokens
};

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Session::Session(const Engine& engine, const SessionOptions& options)
    : data_(std::make_unique<Data>(*engine.data_, options)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

void Session::feed(std::span<const int32_t> tokens) {
  Data& d = *data_;
  if (tokens.empty()) fail("the prompt is empty");
  if (static_cast<int64_t>(tokens.size()) > room())
    fail("the prompt has ", tokens.size(), " tokens, the context has room for ", room());
  for (int32_t id : tokens) {
    if (id < 0 || id >= d.engine.model.config.vocab)
      fail("token id ", id, " is outside the model's vocabulary of ", d.engine.model.config.vocab);
  }
  d.evaluate();  // the token drawn last is no part of the prompt
  d.tokens.insert(d.tokens.end(), tokens.begin(), tokens.end());
  d.prompt_end = d.tokens.size();
  d.evaluate();
}

std::span<const float> Session::logits() {
  data_->finish();
  return data_->read_logits();
}

int32_t Session::next() {
  data_->finish();
  if (room() == 0) fail("the context of ", data_->context, " tokens is full");
  const int32_t id = data_->draw();
  data_->tokens.push_back(id);
  return id;
}

Generated Session::generate(std::span<const int32_t> prompt, int64_t count,
                            const std::function<bool(std::string_view)>& sink, bool ignore_eos) {
  Generated result;
  const std::vector<int32_t>& eos = data_->engine.model.config.eos;
  TextStream stream(data_->engine.tokenizer);
  bool wanted = true;
  const auto emit = [&](const std::string& text) {
    result.text += text;
    wanted = text.empty() || !sink || sink(text);
    return wanted;
  };
  auto start = std::chrono::steady_clock::now();
  feed(prompt);
  data_->engine.backend->synchronize();  // what was fed has been computed, too
  result.prompt_tokens = static_cast<int64_t>(prompt.size());
  result.prompt_seconds = seconds_since(start);
  start = std::chrono::steady_clock::now();
  while (static_cast<int64_t>(result.tokens.size()) < count) {
    if (room() == 0) {
      result.stop = Stop::context_full;
      break;
    }
    const size_t before = data_->evaluated;
    data_->evaluate();
    if (data_->evaluated < data_->tokens.size()) {
      result.stop = Stop::caller;
      break;
    }
    const int32_t id = next();
    result.steps += data_->evaluated > before;
    if (!ignore_eos && std::find(eos.begin(), eos.end(), id) != eos.end()) {
      result.stop = Stop::end_of_text;
      break;
    }
    result.tokens.push_back(id);
    // Vocabularies are padded (Qwen: 151,936 rows for 151,669 tokens): a row without a token has no text.
    if (id < data_->engine.tokenizer.size() && !emit(stream.push(id))) {
      result.stop = Stop::caller;
      break;
    }
  }
  if (wanted) emit(stream.finish());
  result.decode_seconds = seconds_since(start);
  return result;
}

std::span<const int32_t> Session::tokens() const {
  return data_->tokens;
}

int64_t Session::room() const {
  return data_->context - static_cast<int64_t>(data_->tokens.size());
}

}  // namespace larosa
