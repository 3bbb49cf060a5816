#include "eval/tasks.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "base/error.h"

namespace larosa {
namespace {

/// Answers in the order of `score`, the first one among equals.
template <class Score>
int64_t best_of(std::span<const Likelihood> found, const Score& score) {
  size_t best = 0;
  for (size_t i = 1; i < found.size(); ++i)
    if (score(i) > score(best)) best = i;
  return static_cast<int64_t>(best);
}

double acc(const Item& item, std::span<const Likelihood> found) {
  return best_of(found, [&](size_t i) { return found[i].log; }) == item.gold ? 1 : 0;
}

/// Characters, not bytes, are what lm-evaluation-harness divides by (its acc_bytes divides by bytes).
double acc_norm(const Item& item, std::span<const Likelihood> found) {
  const auto characters = [](const std::string& text) {
    return static_cast<double>(
        std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
  };
  const auto score = [&](size_t i) { return found[i].log / characters(item.choices[i]); };
  return best_of(found, score) == item.gold ? 1 : 0;
}

double greedy(const Item&, std::span<const Likelihood> found) {
  return found[0].greedy ? 1 : 0;
}

double loss(const Item&, std::span<const Likelihood> found) {
  return -found[0].log;
}

}  // namespace

const Metric kAcc{"acc", "↑", acc, false}, kAccNorm{"acc_norm", "↑", acc_norm, false},
    kGreedy{"acc", "↑", greedy, false}, kPerplexity{"perplexity", "↓", loss, true};

namespace {

/// lm-evaluation-harness's zero-shot definitions (0.4.13) beside what the files hold.
const std::vector<Task>& tasks() {
  static const std::vector<Task> rows = {
      {"arc_easy", "arc_easy.jsonl", read_multiple_choice, "", "\nAnswer:", {&kAcc, &kAccNorm}},
      {"arc_challenge", "arc_challenge.jsonl", read_multiple_choice, "", "\nAnswer:", {&kAcc, &kAccNorm}},
      {"piqa", "piqa.jsonl", read_multiple_choice, "", "Answer:", {&kAcc, &kAccNorm}},
      {"openbookqa", "openbook_qa.jsonl", read_multiple_choice, "", "", {&kAcc, &kAccNorm}},
      {"winogrande", "winogrande.jsonl", read_winogrande, "", "", {&kAcc}},
      {"boolq", "boolq.jsonl", read_multiple_choice, "Passage: ", "\nAnswer:", {&kAcc}},
      {"hellaswag", "hellaswag_val.txt", read_hellaswag, "", "", {&kAcc, &kAccNorm}},
      {"lambada", "lambada_openai.jsonl", read_lambada, "", "", {&kPerplexity, &kGreedy}},
  };
  return rows;
}

/// Rows that a batch collects. Beyond 512 the products gain nothing (Decoder::kBatch).
constexpr int64_t kBatchRows = Decoder::kBatch;

/// What every item of exported requests has.
std::vector<const Metric*> metrics_of(const std::vector<Item>& items) {
  const auto every = [&](auto has) { return std::all_of(items.begin(), items.end(), has); };
  if (every([](const Item& i) { return i.requests.size() == 1; })) return {&kPerplexity, &kGreedy};
  if (every([](const Item& i) { return !i.choices.empty(); })) return {&kAcc, &kAccNorm};
  return {&kAcc};
}

}  // namespace

std::string task_names() {
  std::string names;
  for (const Task& task : tasks()) names += (names.empty() ? "" : ", ") + task.name;
  return names;
}

Task find_task(const std::string& name, const std::string& dir) {
  const std::string requests = name + ".requests.jsonl";
  const auto row =
      std::find_if(tasks().begin(), tasks().end(), [&](const Task& task) { return task.name == name; });
  std::error_code ignored;
  // A name with a slash would leave the folder.
  if (name.find('/') == std::string::npos &&
      std::filesystem::exists(std::filesystem::path(dir) / requests, ignored)) {
    Task task = row == tasks().end() ? Task{} : *row;
    task.name = name, task.file = requests, task.read = read_requests;
    return task;
  }
  if (row == tasks().end())
    fail("--tasks ", name, ": unknown, expected some of: ", task_names(), "; or a ", requests, " in ", dir);
  return *row;
}

TaskRun load_task(const std::string& name, const std::string& dir, int64_t limit) {
  TaskRun run;
  run.task = find_task(name, dir);
  run.path = (std::filesystem::path(dir) / run.task.file).string();
  run.items = run.task.read(run.task, run.path, limit > 0 ? limit : std::numeric_limits<int64_t>::max());
  if (run.items.empty()) fail(run.path, ": holds no items");
  if (run.task.metrics.empty()) run.task.metrics = metrics_of(run.items);
  for (const Metric* metric : run.task.metrics) {
    for (const Item& item : run.items)
      if (metric == &kAccNorm && item.choices.empty()) fail(item.source, ": choices is absent");
  }
  return run;
}

Mean TaskRun::result(const Metric& metric) const {
  Sums sums;
  for (size_t i = 0; i < found.size(); ++i) sums.add(metric.of(items[i], found[i]));
  return metric.exponential ? perplexity_of(sums.mean()) : sums.mean();
}

void score_items(TaskRun& run, const Tokenizer& tokenizer, int64_t window, LikelihoodScorer& scorer,
                 const std::function<void(size_t first)>& seen) {
  const auto encoded = [&](const Item& item) {
    Question question;
    for (const Request& r : item.requests)
      question.push_back(encode_request(tokenizer, r, window, item.source));
    return question;
  };
  std::vector<Question> batch;
  int64_t rows = 0;
  const auto score_batch = [&] {
    const size_t first = run.found.size();
    for (auto& found : scorer.score(batch)) {
      for (const Likelihood& l : found) {
        if (!std::isfinite(l.log))
          fail(run.items[run.found.size()].source, ": the predictions are not finite (try --check-tensors)");
      }
      run.found.push_back(std::move(found));
    }
    batch.clear();
    rows = 0;
    seen(first);
  };
  for (size_t i = run.found.size(); i < run.items.size(); ++i) {
    Question question = encoded(run.items[i]);
    const int64_t more = LikelihoodScorer::rows_of(question);
    if (rows > 0 && rows + more > kBatchRows) score_batch();
    batch.push_back(std::move(question));
    rows += more;
  }
  if (!batch.empty()) score_batch();
}

}  // namespace larosa
