// The public API on the embedded model.
#include "larosa/engine.h"

#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

SessionOptions greedy() {
  SessionOptions options;
  options.sampling.temperature = 0;
  return options;
}

class EngineTest : public testing::Test {
 protected:
  const Engine engine_{demo_model(), {2, "cpu", "f32", true}};
  const std::vector<int32_t> prompt_ = engine_.encode("It was a dark night, and the wind");
};

TEST_F(EngineTest, GreedyTextIsTheModelsOwn) {
  Session session(engine_, greedy());
  const Generated made = session.generate(prompt_, 12, {}, true);
  ThreadPool pool(2);
  const auto backend = make_cpu_backend({}, pool);
  const Model model = load_model(demo_model());
  std::vector<int32_t> tokens = prompt_;
  for (int32_t id : made.tokens) {  // from scratch at every step
    const auto logits = all_logits(model, *backend, tokens, tokens.size(), true);
    const auto last = logits.end() - model.config.vocab;
    EXPECT_EQ(id, std::max_element(last, logits.end()) - last);
    tokens.push_back(id);
  }
  EXPECT_EQ(std::vector(session.tokens().begin(), session.tokens().end()), tokens);
  EXPECT_EQ(engine_.decode(made.tokens), made.text);
  EXPECT_EQ(made.stop, Stop::length);
  EXPECT_EQ(made.prompt_tokens, static_cast<int64_t>(prompt_.size()));
  EXPECT_EQ(made.steps, 11);
}

TEST_F(EngineTest, APromptMayComeInParts) {
  Session whole(engine_, greedy()), parts(engine_, greedy());
  const auto expected = whole.generate(prompt_, 20, {}, true);
  const size_t half = prompt_.size() / 2;
  parts.feed(std::span(prompt_).first(half));
  const auto found = parts.generate(std::span(prompt_).subspan(half), 20, {}, true);
  EXPECT_EQ(found.tokens, expected.tokens);
  // A second turn goes on after the first one's last token.
  const auto more = engine_.encode(" and then", false);
  const auto next = whole.generate(more, 5, {}, true);
  Session again(engine_, greedy());
  std::vector<int32_t> all = prompt_;
  all.insert(all.end(), expected.tokens.begin(), expected.tokens.end());
  all.insert(all.end(), more.begin(), more.end());
  EXPECT_EQ(again.generate(all, 5, {}, true).tokens, next.tokens);
}

TEST_F(EngineTest, SeedsRepeatAndDiffer) {
  const auto draw = [&](uint64_t seed) {
    SessionOptions options;
    options.sampling.seed = seed;
    return Session(engine_, options).generate(prompt_, 24, {}, true).tokens;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

/// Whether somebody looks at all of them in between or not, and whichever way the draw takes its candidates.
TEST_F(EngineTest, LogitsAreThoseAfterTheLastToken) {
  Session looked(engine_, greedy()), plain(engine_, greedy());
  looked.feed(prompt_), plain.feed(prompt_);
  for (int n = 0; n < 8; ++n) {
    const auto logits = looked.logits();
    ASSERT_EQ(static_cast<int64_t>(logits.size()), engine_.vocab());
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    EXPECT_EQ(looked.logits().data(), logits.data());
    EXPECT_EQ(looked.next(), best);
    EXPECT_EQ(plain.next(), best);
  }
  const auto draw = [&](int top_k) {
    SessionOptions options;
    options.sampling.top_k = top_k;
    options.sampling.repeat_penalty = 1.2f;
    return Session(engine_, options).generate(prompt_, 24, {}, true).tokens;
  };
  EXPECT_EQ(draw(0), draw(static_cast<int>(engine_.vocab()) - 100));
}

TEST_F(EngineTest, StreamsWhatItReturns) {
  Session session(engine_, greedy());
  std::string streamed;
  int pieces = 0;
  const Generated made = session.generate(prompt_, 40, [&](std::string_view text) {
    EXPECT_FALSE(text.empty());
    streamed += text;
    return ++pieces < 5;
  });
  EXPECT_EQ(made.stop, Stop::caller);
  EXPECT_EQ(pieces, 5);
  EXPECT_EQ(streamed, made.text);
}

TEST_F(EngineTest, ACancelledPromptGoesOnWhereItStopped) {
  const std::string text = file_bytes(source_path("text/demo.valid.txt")).substr(0, 1200);
  const auto prompt = engine_.encode(text);
  ASSERT_LT(prompt.size() + 8, static_cast<size_t>(engine_.context()));
  Session whole(engine_, greedy());
  const auto expected = whole.generate(prompt, 8, {}, true).tokens;
  bool cancel = true;
  SessionOptions options = greedy();
  options.cancelled = [&] { return cancel; };
  Session session(engine_, options);
  const Generated stopped = session.generate(prompt, 8, {}, true);
  EXPECT_EQ(stopped.stop, Stop::caller);
  EXPECT_TRUE(stopped.tokens.empty());
  EXPECT_THROW(session.logits(), Error);
  cancel = false;
  std::vector<int32_t> found;
  for (int i = 0; i < 8; ++i) found.push_back(session.next());
  EXPECT_EQ(found, expected);
}

TEST_F(EngineTest, AStoppedSinkIsNotCalledAgain) {
  // A blank and the first byte of a Greek letter: text comes out and a byte stays for the end of the stream.
  // The vocabulary is changed so that the model's first choice is this token.
  constexpr const char* kCut = "\u0120\u00ce";
  const int32_t chosen = Session(engine_, greedy()).generate(prompt_, 1, {}, true).tokens.at(0);
  TemporaryDir dir;
  std::filesystem::copy(demo_model(), dir / "model");
  nlohmann::json tokenizer = read_json(dir / "model/tokenizer.json");
  nlohmann::json& vocab = tokenizer["model"]["vocab"];
  const int32_t cut = vocab.at(kCut);
  for (auto& [text, id] : vocab.items()) {
    if (id == chosen) id = cut;
  }
  vocab[kCut] = chosen;
  std::ofstream(dir / "model/tokenizer.json") << tokenizer;
  const Engine engine(dir / "model", {1, "cpu", "f32", false});
  std::vector<std::string> pieces;
  const auto stop = [&](std::string_view text) {
    pieces.emplace_back(text);
    return false;
  };
  Session stopped(engine, greedy()), whole(engine, greedy());
  EXPECT_EQ(stopped.generate(prompt_, 1, stop, true).stop, Stop::caller);
  EXPECT_EQ(pieces, std::vector<std::string>{" "});
  EXPECT_EQ(whole.generate(prompt_, 1, {}, true).text, " \ufffd");
}

TEST_F(EngineTest, StopsWhenTheContextIsFull) {
  SessionOptions options = greedy();
  options.context = static_cast<int64_t>(prompt_.size()) + 3;
  Session session(engine_, options);
  const Generated made = session.generate(prompt_, 10, {}, true);
  EXPECT_EQ(made.stop, Stop::context_full);
  EXPECT_EQ(made.tokens.size(), 3u);
  EXPECT_EQ(session.room(), 0);
  EXPECT_NE(message_of([&] { session.next(); }).find("full"), std::string::npos);
  EXPECT_NE(message_of([&] { session.feed(prompt_); }).find("room for 0"), std::string::npos);
}

TEST_F(EngineTest, BackendsAndCachesAgree) {
  const Engine ref(demo_model(), {1, "ref", "f32", false});
  Session a(engine_, greedy()), b(ref, greedy());
  SessionOptions half = greedy();
  half.kv = "f16";
  Session c(engine_, half);
  const auto expected = b.generate(prompt_, 8, {}, true).tokens;
  EXPECT_EQ(a.generate(prompt_, 8, {}, true).tokens, expected);
  EXPECT_EQ(c.generate(prompt_, 8, {}, true).tokens, expected);
  half.kv = "int8";
  Session d(engine_, half);
  EXPECT_EQ(d.generate(prompt_, 8, {}, true).tokens, expected);
  EXPECT_GT(engine_.token_cost(100).bytes, engine_.token_cost(100, "f16").bytes);
  EXPECT_GT(engine_.token_cost(100, "f16").bytes, engine_.token_cost(100, "int8").bytes);
  EXPECT_EQ(engine_.token_cost().bytes, engine_.token_cost().dense_bytes);
}

TEST_F(EngineTest, RefusesWhatCannotBe) {
  EXPECT_NE(message_of([&] { Engine("/nonexistent"); }).find("/nonexistent"), std::string::npos);
  EXPECT_NE(message_of([&] {
              Engine(demo_model(), {1, "gpu", "f32", false});
            }).find("backend gpu"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              Engine(demo_model(), {1, "cpu", "int3", false});
            }).find("products int3"),
            std::string::npos);
  Session session(engine_, greedy());
  EXPECT_NE(message_of([&] { session.next(); }).find("empty"), std::string::npos);
  EXPECT_NE(message_of([&] { session.feed({}); }).find("empty"), std::string::npos);
  for (const int32_t id : {-1, static_cast<int32_t>(engine_.vocab())}) {
    EXPECT_NE(message_of([&] { session.feed(std::span(&id, 1)); }).find("vocabulary"), std::string::npos);
  }
  for (const int64_t context : {int64_t{-1}, engine_.context() + 1}) {
    SessionOptions options;
    options.context = context;
    EXPECT_NE(message_of([&] { Session(engine_, options); }).find("context"), std::string::npos);
  }
  SessionOptions options;
  options.kv = "int2";
  EXPECT_NE(message_of([&] { Session(engine_, options); }).find("kv int2"), std::string::npos);
  const std::vector<int32_t> bad = {1 << 30};
  EXPECT_THROW(engine_.decode(bad), Error);
}

}  // namespace
}  // namespace larosa
