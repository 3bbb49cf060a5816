// Zero-shot tasks with lm-evaluation-harness's definitions: a row per task, src/eval/tasks/<kind>.cpp for
// what files of a kind hold.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/likelihood.h"
#include "eval/mean.h"
#include "text/tokenizer.h"

namespace larosa {

/// A document as lm-evaluation-harness asks about it.
struct Item {
  std::string source;                // "file:line", for messages
  std::vector<Request> requests;     // one per answer; a single one has no alternatives
  std::vector<std::string> choices;  // the answers as they are counted for acc_norm; empty: no acc_norm
  int64_t gold = 0;                  // which request is right
};

/// A quantity of every item and how the mean over the items is shown.
struct Metric {
  const char* name;
  const char* better;  // "↑" or "↓"
  double (*of)(const Item& item, std::span<const Likelihood> found);
  bool exponential;  // exp(−mean), perplexity
};
/// acc: the most likely answer is the right one. acc_norm: the answer of largest log-likelihood per
/// character. greedy ("acc" of a task without alternatives): every token is the most likely one. perplexity:
/// exp of the mean of −log-likelihood, over items, not tokens. Among equals the first answer counts.
extern const Metric kAcc, kAccNorm, kGreedy, kPerplexity;

struct Task {
  using Reader = std::vector<Item> (*)(const Task& task, const std::string& path, int64_t limit);

  std::string name;                    // lm-evaluation-harness's, "lambada" for lambada_openai
  std::string file;                    // in the data folder
  Reader read;                         // the first `limit` items; throws Error naming file, line and field
  std::string lead;                    // of the file's query, that lm-evaluation-harness does not ask
  std::string ending;                  // what it puts behind the query
  std::vector<const Metric*> metrics;  // empty: by what the items have
};

/// The rows, for help texts and messages: "arc_easy, arc_challenge, …".
std::string task_names();
/// Row `name`; in its place `dir`/name.requests.jsonl, if there is one: lm-evaluation-harness's own requests
/// (dev/lm_eval_export.py), which may be of any task. Throws Error listing the known names.
Task find_task(const std::string& name, const std::string& dir);

/// A task with its items and what was found for the first of them.
struct TaskRun {
  Task task;
  std::string path;
  std::vector<Item> items;
  std::vector<std::vector<Likelihood>> found;

  bool finished() const { return found.size() == items.size(); }
  /// Of the items found so far.
  Mean result(const Metric& metric) const;
};
/// Reads `dir`/task.file; limit 0: every item. Throws Error, also for a file without items.
TaskRun load_task(const std::string& name, const std::string& dir, int64_t limit);

/// Scores the items that `run` lacks, a batch of neighbours at once; `seen(first)` is called after each batch
/// with the index of its first item, `found` then holds it. What is found does not depend on where a run was
/// taken up again, as long as that is where a batch ended.
void score_items(TaskRun& run, const Tokenizer& tokenizer, int64_t window, LikelihoodScorer& scorer,
                 const std::function<void(size_t first)>& seen);

/// How files of a kind become items (src/eval/tasks/<kind>.cpp).
std::vector<Item> read_multiple_choice(const Task& task, const std::string& path, int64_t limit);
std::vector<Item> read_winogrande(const Task& task, const std::string& path, int64_t limit);
std::vector<Item> read_hellaswag(const Task& task, const std::string& path, int64_t limit);
std::vector<Item> read_lambada(const Task& task, const std::string& path, int64_t limit);
std::vector<Item> read_requests(const Task& task, const std::string& path, int64_t limit);

}  // namespace larosa
