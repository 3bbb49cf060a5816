// larosa eval: zero-shot tasks, as lm-evaluation-harness defines them.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "command.h"
#include "engine/engine_data.h"
#include "eval/tasks.h"
#include "io/files.h"
#include "io/json.h"

namespace larosa {
namespace {

using Json = nlohmann::ordered_json;

struct Flags {
  std::string model, data = "tasks", output, samples, kv = "f32";
  std::vector<std::string> tasks;
  int64_t limit = 0;
  bool check_tensors = false, json = false;
  MachineOptions machine;
};

/// Everything that the likelihoods depend on: a journal of another job is not taken up.
std::string job_line(const Flags& f, const Model& model, const std::vector<TaskRun>& runs,
                     const Backend& backend) {
  Json tasks = Json::array();
  for (const TaskRun& run : runs) {
    std::string requests;
    for (const Item& item : run.items)
      for (const Request& r : item.requests) requests += r.context + '\0' + r.continuation + '\0';
    tasks.push_back(
        {{"name", run.task.name}, {"items", run.items.size()}, {"requests", fingerprint_of(requests)}});
  }
  // The fingerprint names tensors; base frequencies stand in the config, ids come from the tokenizer's files.
  std::string files;
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
                           "tokenizer_config.json"}) {
    const auto path = std::filesystem::path(f.model) / name;
    if (std::filesystem::exists(path)) files += read_file(path.string()) + '\0';
  }
  const Json job = {{"model", model.checkpoint ? model.checkpoint->fingerprint() : ""},
                    {"files", fingerprint_of(files)},
                    {"plan", fingerprint_of(plan_to_json(model.plan))},
                    {"tasks", tasks},
                    {"kv", f.kv},
                    {"products", backend.products_name()},
                    {"device", f.machine.device},
                    {"backend", f.machine.backend}};
  return job.dump();
}

/// A batch as a line of the journal.
std::string batch_line(const TaskRun& run, size_t first) {
  Json batch = Json::array();
  for (size_t i = first; i < run.found.size(); ++i) {
    Json item = Json::array();
    for (const Likelihood& l : run.found[i]) item.push_back({l.log, l.greedy});
    batch.push_back(std::move(item));
  }
  return Json{{"task", run.task.name}, {"first", first}, {"found", batch}}.dump();
}

/// Puts the batches of an interrupted run into `runs`; throws Error for a journal of something else.
void take_up(const Journal& journal, const std::string& path, const std::string& job,
             std::vector<TaskRun>& runs) {
  if (journal.lines()[0] != job)
    fail(path,
         ":1: belongs to another model, other tasks or other options; remove it or choose another name");
  for (size_t n = 1; n < journal.lines().size(); ++n) {
    const std::string source = path + ":" + std::to_string(n + 1);
    const nlohmann::json object = parse_json(journal.lines()[n], source);
    const Fields line(object, source);
    const std::string name = line.text("task");
    const auto run =
        std::find_if(runs.begin(), runs.end(), [&](const TaskRun& r) { return r.task.name == name; });
    if (run == runs.end()) line.refuse("task", "expected one of the job's");
    const auto next = static_cast<int64_t>(run->found.size());
    line.integer("first", next, next);
    for (const nlohmann::json& item : line.get("found")) {
      if (run->finished() || item.size() != run->items[run->found.size()].requests.size())
        line.refuse("found", "expected a pair for each request");
      std::vector<Likelihood> found;
      for (const nlohmann::json& pair : item) {
        if (!pair.is_array() || pair.size() != 2 || !pair[0].is_number() || !pair[1].is_boolean())
          line.refuse("found", "expected pairs of a number and true or false");
        found.push_back({pair[0].get<double>(), pair[1].get<bool>()});
      }
      run->found.push_back(std::move(found));
    }
  }
}

void print_table(const std::vector<TaskRun>& runs) {
  std::printf("| task             | items | metric     |   |    value |   |  stderr |\n");
  std::printf("|------------------|------:|------------|---|---------:|---|--------:|\n");
  for (const TaskRun& run : runs) {
    for (const Metric* metric : run.task.metrics) {
      const Mean result = run.result(*metric);
      std::printf("| %-16s | %5zu | %-10s | %s | %8.4f | ± | %7.4f |\n", run.task.name.c_str(),
                  run.found.size(), metric->name, metric->better, result.value, result.error);
    }
  }
}

Json results_json(const Flags& f, const std::vector<TaskRun>& runs, const Backend& backend) {
  Json tasks = Json::object();
  for (const TaskRun& run : runs) {
    Json& task = tasks[run.task.name];
    task["items"] = run.found.size();
    for (const Metric* metric : run.task.metrics) {
      const Mean result = run.result(*metric);
      task[metric->name] = result.value;
      task[std::string(metric->name) + "_stderr"] = result.error;
    }
  }
  return {{"model", f.model}, {"products", backend.products_name()}, {"kv", f.kv}, {"tasks", tasks}};
}

/// A line an item, in the words of lm-evaluation-harness's sample files.
std::string samples_text(const std::vector<TaskRun>& runs) {
  std::string text;
  for (const TaskRun& run : runs) {
    for (size_t i = 0; i < run.found.size(); ++i) {
      const Item& item = run.items[i];
      Json line = {{"task", run.task.name}, {"doc_id", i}, {"target", item.gold}};
      for (size_t r = 0; r < item.requests.size(); ++r) {
        line["arguments"].push_back({item.requests[r].context, item.requests[r].continuation});
        line["resps"].push_back({run.found[i][r].log, run.found[i][r].greedy});
      }
      for (const Metric* metric : run.task.metrics) {
        const double value = metric->of(item, run.found[i]);
        line[metric->name] = metric->exponential ? -value : value;
      }
      text += line.dump() + '\n';
    }
  }
  return text;
}

void score_all(const Flags& f, const Model& model, const Tokenizer& tokenizer, Machine& machine,
               std::vector<TaskRun>& runs, Journal* journal) {
  LikelihoodScorer scorer(model, *machine.backend, *machine.pool, kv_dtype(f.kv));
  size_t total = 0, done = 0;
  for (const TaskRun& run : runs) total += run.items.size(), done += run.found.size();
  Progress progress("eval", static_cast<int64_t>(total - done), !f.machine.no_progress);
  int64_t scored = 0;
  for (TaskRun& run : runs) {
    score_items(run, tokenizer, model.config.context, scorer, [&](size_t first) {
      if (journal) journal->append(batch_line(run, first));
      scored += static_cast<int64_t>(run.found.size() - first);
      char note[64];
      const Metric& metric = *run.task.metrics[0];
      std::snprintf(note, sizeof(note), " %s %.4f", metric.name, run.result(metric).value);
      progress.update(scored, run.task.name + note);
      throw_if_interrupted();
    });
  }
}

int run(const Flags& f) {
  std::vector<TaskRun> runs;
  for (const std::string& name : f.tasks) {
    for (const TaskRun& before : runs)
      if (before.task.name == name) fail("--tasks ", name, ": stands twice");
    runs.push_back(load_task(name, f.data, f.limit));
  }
  for (const std::string& path : {f.output, f.samples}) {
    const auto above = std::filesystem::path(path).parent_path();
    if (!above.empty() && !std::filesystem::is_directory(above))
      fail(path, ": the directory ", above.string(), " does not exist");
    if (std::filesystem::is_directory(path)) fail(path, ": is a directory, expected a file to write");
  }
  if (!f.output.empty() && f.output == f.samples) fail("--samples ", f.samples, ": is also -o");
  Machine machine = make_machine(f.machine);
  Model model = load_model(f.model);
  if (f.check_tensors) check_finite(model);
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  const std::string partial = (f.output.empty() ? f.samples : f.output) + ".partial";
  std::optional<Journal> journal;
  if (!f.output.empty() || !f.samples.empty()) {
    journal.emplace(partial);
    const std::string job = job_line(f, model, runs, *machine.backend);
    if (journal->lines().empty()) {
      journal->append(job);
    } else {
      take_up(*journal, partial, job, runs);
    }
  }
  place(model, *machine.backend);
  std::fprintf(stderr, "%s\n", machine.backend->describe().c_str());
  catch_interrupts();
  try {
    score_all(f, model, tokenizer, machine, runs, journal ? &*journal : nullptr);
  } catch (const Interrupted&) {
    if (journal)
      std::fprintf(stderr, "finished questions are kept in %s, the same command goes on\n", partial.c_str());
    throw;
  }
  const Json results = results_json(f, runs, *machine.backend);
  if (!f.samples.empty()) write_file(f.samples, samples_text(runs));
  if (!f.output.empty()) write_file(f.output, json_text(results) + "\n");
  if (journal) journal->remove();
  if (f.json) {
    std::printf("%s\n", json_text(results).c_str());
  } else {
    print_table(runs);
  }
  return 0;
}

}  // namespace

std::function<int()> setup_eval(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  app.add_option("model,-m,--model", f->model, "Model directory")->required();
  app.add_option("--tasks", f->tasks,
                 "Tasks, several by commas: " + task_names() +
                     "; or NAME for NAME.requests.jsonl in the folder (dev/lm_eval_export.py)")
      ->delimiter(',')
      ->required();
  app.add_option("--data", f->data, "Folder of the tasks' files")->capture_default_str();
  app.add_option("--limit", f->limit, "Only the first items of each task")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  app.add_option("-o,--output", f->output,
                 "Results as JSON; until they are complete FILE.partial keeps what is finished, and the same "
                 "command goes on from there");
  app.add_option("--samples", f->samples,
                 "Every item with its requests and log-likelihoods, a JSON line each");
  app.add_option("--kv", f->kv, "Type of the key/value cache")
      ->check(CLI::IsMember({"f32", "f16", "int8"}))
      ->capture_default_str();
  app.add_flag("--check-tensors", f->check_tensors, "Refuse tensors with NaN or infinity");
  app.add_flag("--json", f->json, "Results as JSON on standard output");
  f->machine.declare(app);
  return [f] { return run(*f); };
}

}  // namespace larosa
