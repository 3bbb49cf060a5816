// Zero-shot tasks against lm-evaluation-harness through transformers (dev/lm_eval_check.py), and what their
// files may get wrong.
#include "eval/tasks.h"

#include "io/files.h"
#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

constexpr const char* kTasks[] = {"arc_easy",   "arc_challenge", "piqa",      "openbookqa",
                                  "winogrande", "boolq",         "hellaswag", "lambada"};

class Tasks : public testing::Test {
 protected:
  TaskRun scored(TaskRun run, size_t stop = SIZE_MAX) {
    LikelihoodScorer scorer(model_, *backend_, pool_, DType::f32);
    struct Stop {};
    try {
      score_items(run, tokenizer_, model_.config.context, scorer, [&](size_t) {
        if (run.found.size() >= stop) throw Stop{};
      });
    } catch (const Stop&) {
    }
    return run;
  }

  /// −log p and whether every token is the likeliest, from the logits of one sequence.
  Likelihood alone(const EncodedRequest& e) {
    std::vector<int32_t> tokens = e.context;
    tokens.insert(tokens.end(), e.continuation.begin(), e.continuation.end());
    const auto vocab = static_cast<size_t>(model_.config.vocab);
    const auto logits = all_logits(model_, *backend_, tokens, tokens.size());
    Likelihood found{0, true};
    for (size_t i = e.context.size(); i < tokens.size(); ++i) {
      const float* row = &logits[(i - 1) * vocab];
      double sum = 0;
      for (size_t v = 0; v < vocab; ++v) sum += std::exp(double{row[v]});
      found.log += double{row[tokens[i]]} - std::log(sum);
      found.greedy = found.greedy && std::max_element(row, row + vocab) == row + tokens[i];
    }
    return found;
  }
  EncodedRequest encoded(const std::string& context, const std::string& continuation, int64_t window = 512) {
    return encode_request(tokenizer_, {context, continuation}, window, "file:1");
  }

  /// The message that a task's file of this content gives.
  std::string refused(const std::string& task, const std::string& file, const std::string& content) {
    const TemporaryDir dir;
    write_file(dir / file, content);
    return message_of([&] { load_task(task, dir / "", 0); });
  }
  static void expect_part(const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text << " lacks " << part;
  }

  std::string data_ = source_path("tests/golden/tasks");
  ThreadPool pool_{2};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
  Model model_ = load_model(demo_model());
  Tokenizer tokenizer_ = Tokenizer::load(demo_model());
};

TEST_F(Tasks, EqualLmEvaluationHarness) {
  const nlohmann::json golden = read_json(data_ + "/demo-7m.json");
  ASSERT_EQ(golden.size(), std::size(kTasks));
  for (const char* name : kTasks) {
    const TaskRun run = scored(load_task(name, data_, 0));
    const nlohmann::json& expected = golden.at(name);
    ASSERT_EQ(run.items.size(), expected["items"].size()) << name;
    for (size_t i = 0; i < run.items.size(); ++i) {
      const nlohmann::json& item = expected["items"][i];
      const auto& requests = run.items[i].requests;
      ASSERT_EQ(requests.size(), item["arguments"].size()) << name << i;
      for (size_t r = 0; r < requests.size(); ++r) {
        EXPECT_EQ(requests[r].context, item["arguments"][r][0].get<std::string>()) << name << i;
        EXPECT_EQ(requests[r].continuation, item["arguments"][r][1].get<std::string>()) << name << i;
        const double log = item["resps"][r][0].get<double>();
        EXPECT_NEAR(run.found[i][r].log, log, 1e-4 * std::abs(log)) << name << i;
        EXPECT_EQ(run.found[i][r].greedy, item["resps"][r][1].get<bool>()) << name << i;
      }
      for (const Metric* metric : run.task.metrics) {
        if (metric->exponential) continue;
        EXPECT_EQ(metric->of(run.items[i], run.found[i]), item.at(metric->name).get<double>()) << name << i;
      }
    }
    for (const Metric* metric : run.task.metrics) {
      const Mean result = run.result(*metric);
      const double value = expected["results"].at(metric->name).get<double>();
      EXPECT_NEAR(result.value, value, 1e-4 * value) << name;
      if (metric->exponential) continue;  // lm-eval's error of perplexity is a bootstrap's
      const double error = expected["results"].at(std::string(metric->name) + "_stderr").get<double>();
      EXPECT_NEAR(result.error, error, 1e-9) << name;
    }
  }
}

TEST_F(Tasks, ABatchGivesWhatEachRequestGivesAlone) {
  std::string tail;  // more rows than one pass takes: the last question is cut
  for (int i = 0; i < 100; ++i) tail += " more and more";
  const std::vector<Question> questions = {
      {encoded("The lamp of the tower", " was lit every evening."), encoded("The lamp of the tower", " a")},
      {encoded("It was a dark night", " and"), encoded("It was a dark", " night and the sea was calm")},
      {encoded("One" + tail, " two"), encoded("One" + tail, " three four five")},
      {encoded("Two" + tail, " three four"), encoded("Two" + tail, " four")}};
  int64_t rows = 0;
  for (const Question& q : questions) rows += LikelihoodScorer::rows_of(q);
  EXPECT_GT(rows, Decoder::kBatch);
  LikelihoodScorer scorer(model_, *backend_, pool_, DType::f32);
  const auto found = scorer.score(questions);
  ASSERT_EQ(found.size(), questions.size());
  for (size_t q = 0; q < questions.size(); ++q) {
    ASSERT_EQ(found[q].size(), questions[q].size());
    for (size_t r = 0; r < questions[q].size(); ++r) {
      const Likelihood expected = alone(questions[q][r]);
      EXPECT_NEAR(found[q][r].log, expected.log, 1e-4 * std::abs(expected.log)) << q << r;
      EXPECT_EQ(found[q][r].greedy, expected.greedy) << q << r;
    }
  }
  EXPECT_EQ(LikelihoodScorer::rows_of(questions[1]),
            static_cast<int64_t>(questions[1][0].context.size() + questions[1][1].context.size() +
                                 questions[1][1].continuation.size() - 1));
}

TEST_F(Tasks, TakenUpAgainNothingDiffers) {
  TaskRun run = load_task("piqa", data_, 0);
  const std::vector<Item> items = run.items;
  run.items.insert(run.items.end(), items.begin(), items.begin() + 2);
  const TaskRun whole = scored(run);
  run = scored(std::move(run), 2);
  ASSERT_GE(run.found.size(), 2u);
  ASSERT_FALSE(run.finished());
  run = scored(std::move(run));
  ASSERT_TRUE(run.finished());
  for (size_t i = 0; i < run.found.size(); ++i)
    for (size_t r = 0; r < 2; ++r) EXPECT_EQ(run.found[i][r].log, whole.found[i][r].log);
}

TEST_F(Tasks, RequestsBecomeTokens) {
  const TokenId bos = tokenizer_.bos();
  const auto text = [&](const std::vector<int32_t>& ids) { return tokenizer_.decode(ids, false); };
  EncodedRequest e = encoded("A b ", "c");
  EXPECT_EQ(e.context[0], bos);
  EXPECT_EQ(text({e.context.begin() + 1, e.context.end()}), "A b");
  EXPECT_EQ(text(e.continuation), " c");
  const std::string start = tokenizer_.decode(std::vector<TokenId>{bos}, false);
  EXPECT_EQ(encoded(start + "A b", " c").context, e.context);  // no second one
  e = encoded("", "The sea");
  EXPECT_EQ(e.context, std::vector<int32_t>{bos});
  EXPECT_EQ(text(e.continuation), "The sea");
  const EncodedRequest whole = encoded("One two three four", " five six");
  e = encoded("One two three four", " five six", static_cast<int64_t>(whole.continuation.size()) + 1);
  EXPECT_EQ(e.continuation, whole.continuation);
  EXPECT_EQ(e.context, std::vector<int32_t>(whole.context.end() - 2, whole.context.end()));
  expect_part(message_of([&] { encoded("One", " two three four five", 2); }),
              "file:1: the continuation has ");
  expect_part(message_of([&] { encoded("One", ""); }), "file:1: the continuation has no token");
}

TEST_F(Tasks, ExportedRequestsGoBeforeTheRow) {
  const TemporaryDir dir;
  write_file(dir / "sciq.requests.jsonl", R"({"arguments": [["a", " b"], ["a", " c"]], "gold": 1})"
                                          "\n");
  write_file(dir / "piqa.requests.jsonl",
             R"({"arguments": [["a", " b"], ["a", " c"]], "gold": 0, "choices": ["b", "c"]})"
             "\n");
  write_file(dir / "last.requests.jsonl", R"({"arguments": [["a", " b"]]})"
                                          "\n");
  EXPECT_EQ(load_task("sciq", dir / "", 0).task.metrics, std::vector<const Metric*>{&kAcc});
  EXPECT_EQ(load_task("piqa", dir / "", 0).items[0].requests[1].continuation, " c");
  EXPECT_EQ(load_task("last", dir / "", 0).task.metrics,
            (std::vector<const Metric*>{&kPerplexity, &kGreedy}));
}

TEST_F(Tasks, NormalisedAccuracyCountsCharacters) {
  const Item item{"", {{"", ""}, {"", ""}}, {"äöü", "abcd"}, 0};
  const std::vector<Likelihood> found = {{-3.1, false}, {-4.0, false}};  // −1.03 and −1 each; by bytes −0.52
  EXPECT_EQ(kAccNorm.of(item, found), 0);
  EXPECT_EQ(kAcc.of(item, found), 1);
}

TEST_F(Tasks, ErrorsNameFileLineAndField) {
  const std::string good = R"({"query": "a", "choices": ["b", "c"], "gold": 1})";
  expect_part(message_of([&] { load_task("arc", data_, 0); }),
              "--tasks arc: unknown, expected some of: arc_easy");
  expect_part(message_of([&] { load_task("piqa", "/nowhere", 0); }), "/nowhere/piqa.jsonl: cannot be opened");
  const auto piqa = [&](const std::string& content) { return refused("piqa", "piqa.jsonl", content); };
  expect_part(piqa(""), "piqa.jsonl: holds no items");
  expect_part(piqa(good + "\n{\"query\""), "piqa.jsonl:2: malformed JSON");
  expect_part(piqa(good + "\n[1]\n"), "piqa.jsonl:2: the line holds [1]");
  expect_part(piqa(R"({"query": "a", "gold": 1})"), "piqa.jsonl:1: choices is absent");
  expect_part(piqa(R"({"query": "a", "choices": ["b", 7], "gold": 1})"),
              "piqa.jsonl:1: choices is [\"b\",7]");
  expect_part(piqa(R"({"query": "a", "choices": ["b", "c"], "gold": 2})"), "piqa.jsonl:1: gold is 2");
  expect_part(refused("boolq", "boolq.jsonl", good),
              "boolq.jsonl:1: query is \"a\", expected a text that starts");
  expect_part(refused("winogrande", "winogrande.jsonl", good),
              "winogrande.jsonl:1: context_options is absent");
  expect_part(refused("lambada", "lambada_openai.jsonl", good), "lambada_openai.jsonl:1: context is absent");
  const auto hellaswag = [&](const std::string& content) {
    return refused("hellaswag", "hellaswag_val.txt", content);
  };
  expect_part(hellaswag("a: b\n4\nc\nd\ne\nf\n"), "hellaswag_val.txt:2: the right ending is \"4\"");
  expect_part(hellaswag("a: b\n1\nc\nd\ne\nf\na\n"), "hellaswag_val.txt:7: the item has 1 lines, expected 6");
  expect_part(hellaswag("a: b\n1\nc\n\ne\nf\n"), "hellaswag_val.txt:4: the ending is empty");
  expect_part(refused("x", "x.requests.jsonl", R"({"arguments": [["a"]]})"),
              "x.requests.jsonl:1: arguments is [[\"a\"]]");
}

TEST_F(Tasks, AJournalKeepsWholeLines) {
  const TemporaryDir dir;
  const std::string path = dir / "job.partial";
  {
    Journal journal(path);
    EXPECT_TRUE(journal.lines().empty());
    journal.append("one");
    journal.append("two");
    expect_part(message_of([&] { Journal second(path); }), "job.partial: is in use by another process");
  }
  std::ofstream(path, std::ios::app) << "thr";
  {
    Journal journal(path);
    EXPECT_EQ(journal.lines(), (std::vector<std::string>{"one", "two"}));
    journal.append("three");
  }
  EXPECT_EQ(file_bytes(path), "one\ntwo\nthree\n");
  Journal(path).remove();
  EXPECT_FALSE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace larosa
