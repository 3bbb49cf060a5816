// larosa bench: how fast a model, or any shape with random weights, runs on this machine.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "backend/bandwidth.h"
#include "base/error.h"
#include "base/progress.h"
#include "calib/methods.h"
#include "command.h"
#include "io/json.h"
#include "model/decoder.h"
#include "model/random.h"
#include "version.h"

namespace larosa {
namespace {

struct Flags {
  std::string model, config, save, format = "md", method = "larosa", dtype = "bf16", kv = "f32";
  bool random_weights = false;
  int64_t prompt = 512, gen = 128, depth = 0, reps = 5, shard_mb = 5000;
  std::vector<double> sparsity;
  MachineOptions machine;
};

/// How the weights of one model are read. Several readings share the memory, so that they differ by nothing
/// else.
struct Reading {
  std::vector<LayerPlan> plans;
  std::vector<std::vector<GroupData>> groups;
  std::vector<Weight> adapters;
};

Reading reading_of(const Model& model) {
  Reading reading;
  for (const Layer& layer : model.layers) {
    reading.plans.push_back(layer.plan);
    reading.groups.push_back(layer.groups);
    reading.adapters.push_back(layer.adapter);
  }
  return reading;
}

/// Every channel and no adapter: what the model costs without larosa.
Reading dense_reading(const Model& model) {
  const size_t layers = model.layers.size();
  const LayerPlan plan = dense_layer();
  return {std::vector(layers, plan), std::vector(layers, std::vector<GroupData>(plan.groups.size())),
          std::vector<Weight>(layers)};
}

void use(Model& model, const Reading& reading) {
  for (size_t l = 0; l < model.layers.size(); ++l) {
    model.layers[l].plan = reading.plans[l];
    model.layers[l].groups = reading.groups[l];
    model.layers[l].adapter = reading.adapters[l];
  }
}

DType dtype_of(const std::string& name) {
  return name == "f32" ? DType::f32 : name == "f16" ? DType::f16 : DType::bf16;
}

Plan plan_of(const ModelConfig& config, const std::string& method, double sparsity) {
  Choice choice;
  choice.sparsity = sparsity;
  return plan_model(find_method(method), config, choice);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

/// One line of the table: a reading and a test, timed once per repetition.
struct Row {
  size_t reading = 0;
  std::string test;
  int64_t tokens = 0;
  double sparsity = 0;          // of the projections' weight bytes
  double bytes = 0;             // read per token; 0 for prompts
  double dense_bytes = 0;       // the same of the dense reading
  std::vector<double> seconds;  // per repetition

  std::vector<double> rates() const {
    std::vector<double> r;
    for (double s : seconds) r.push_back(static_cast<double>(tokens) / s);
    return r;
  }
  double mean_rate() const {
    double sum = 0;
    for (double r : rates()) sum += r;
    return sum / static_cast<double>(seconds.size());
  }
  double rate_deviation() const {
    double sum = 0;
    const double mean = mean_rate();
    for (double r : rates()) sum += (r - mean) * (r - mean);
    return seconds.size() > 1 ? std::sqrt(sum / static_cast<double>(seconds.size() - 1)) : 0;
  }
};

struct Report {
  std::string name;     // "llama 1.24B bf16"
  std::string backend;  // one line
  int64_t bytes = 0;    // of the dense reading's tensors
  int64_t parameters = 0;
  int threads = 0;
  std::vector<double> bandwidth;  // GB/s, per repetition
  std::vector<Row> rows;

  /// Ratios are taken within a repetition, so that a slow moment of the machine touches both sides.
  double bandwidth_share(const Row& row) const {
    std::vector<double> shares;
    for (size_t i = 0; i < row.seconds.size(); ++i)
      shares.push_back(row.bytes * row.rates()[i] * 1e-9 / bandwidth[i]);
    return median(shares);
  }
  double speedup(const Row& row) const {
    for (const Row& dense : rows) {
      if (dense.reading != 0 || dense.test != row.test) continue;
      std::vector<double> ratios;
      for (size_t i = 0; i < row.seconds.size(); ++i) ratios.push_back(dense.seconds[i] / row.seconds[i]);
      return median(ratios);
    }
    return 1;
  }
};

/// One timeline whose positions are written again and again.
class Timeline {
 public:
  Timeline(const Model& model, Backend& backend, int64_t capacity, DType kv)
      : model_(model),
        decoder_(model.config, backend),
        cache_(backend.make_kv_cache(
            {model.config.layers, model.config.kv_heads, model.config.head_dim, capacity, kv})),
        hidden_(static_cast<size_t>(Decoder::kBatch * model.config.dim)),
        logits_(static_cast<size_t>(model.config.vocab)) {}

  /// `count` tokens at `pos` …, one after another or together, with the logits after the last of each step.
  void feed(int64_t pos, int64_t count, bool together, const Pass& pass) {
    const int64_t step = together ? Decoder::kBatch : 1;
    for (int64_t first = 0; first < count; first += step) {
      throw_if_interrupted();
      const int64_t rows = std::min(step, count - first);
      tokens_.resize(static_cast<size_t>(rows));
      for (int32_t& id : tokens_) {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        id = static_cast<int32_t>((state_ >> 33) % static_cast<uint64_t>(model_.config.vocab));
      }
      const Mat hidden(hidden_.data(), rows, model_.config.dim);
      decoder_.forward(model_, tokens_, *cache_, pos + first, pass, hidden);
      if (first + rows == count || !together)
        decoder_.logits(model_, hidden.slice(rows - 1, 1), Mat(logits_.data(), 1, model_.config.vocab));
    }
  }

 private:
  const Model& model_;
  Decoder decoder_;
  std::unique_ptr<KvCache> cache_;
  std::vector<float> hidden_, logits_;
  std::vector<int32_t> tokens_;
  uint64_t state_ = 1;
};

std::string short_count(int64_t n) {
  char text[32];
  const double v = static_cast<double>(n);
  if (n >= 1000000000) {
    std::snprintf(text, sizeof(text), "%.2fB", v * 1e-9);
  } else {
    std::snprintf(text, sizeof(text), "%.2fM", v * 1e-6);
  }
  return text;
}

Report measure(const Flags& f, Model& model, const std::vector<Reading>& readings, Machine& machine) {
  const ModelConfig& c = model.config;
  const DType kv = dtype_of(f.kv);
  Report report;
  report.parameters = parameter_count(c);
  report.name = c.architecture + " " + short_count(report.parameters) + " " +
                dtype_name(model.layers[0].weights[Projection::wq].dtype);
  report.backend = machine.backend->describe();
  report.threads = machine.pool->size();
  use(model, readings[0]);
  report.bytes = model_bytes(model);
  const auto at_depth = [&](const std::string& test) {
    return f.depth > 0 ? test + " @ d" + std::to_string(f.depth) : test;
  };
  for (size_t i = 0; i < readings.size(); ++i) {
    use(model, readings[i]);
    const TokenBytes bytes = token_bytes(model, kv);
    const double sparsity =
        1 - static_cast<double>(bytes.projections) / static_cast<double>(bytes.projections_dense);
    const int64_t positions = f.depth + f.gen / 2;  // the cache's mean length
    if (f.prompt > 0)
      report.rows.push_back({i, at_depth("pp" + std::to_string(f.prompt)), f.prompt, sparsity, 0, 0, {}});
    if (f.gen > 0)
      report.rows.push_back({i,
                             at_depth("tg" + std::to_string(f.gen)),
                             f.gen,
                             sparsity,
                             static_cast<double>(bytes.sparse(positions)),
                             static_cast<double>(bytes.dense(positions)),
                             {}});
  }
  Timeline timeline(model, *machine.backend, f.depth + std::max(f.prompt, f.gen), kv);
  constexpr int64_t kBandwidthBytes = int64_t{1} << 30;
  Progress progress("bench", f.reps * static_cast<int64_t>(report.rows.size()), !f.machine.no_progress);
  for (const Reading& reading : readings) {  // touches every page and every code path once
    use(model, reading);
    timeline.feed(0, std::max<int64_t>(f.depth, 1), true, Pass{true, nullptr});
    timeline.feed(f.depth, std::min<int64_t>(f.gen, 2), false, Pass{});
  }
  for (int64_t rep = 0, done = 0; rep < f.reps; ++rep) {
    report.bandwidth.push_back(measure_read_bandwidth(*machine.pool, kBandwidthBytes));
    for (Row& row : report.rows) {
      use(model, readings[row.reading]);
      const bool prompt = row.bytes == 0;
      const auto start = std::chrono::steady_clock::now();
      timeline.feed(f.depth, row.tokens, prompt, Pass{prompt, nullptr});  // prompts run dense, as in `run`
      row.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      progress.update(++done);
    }
  }
  return report;
}

void print_md(const Report& r) {
  std::printf("%s; read bandwidth %.2f GB/s (median of %zu)\n\n", r.backend.c_str(), median(r.bandwidth),
              r.bandwidth.size());
  std::printf(
      "| model | size | params | threads | sparsity | test | t/s | MB/token | GB/s | of bandwidth | x dense "
      "| "
      "ideal |\n|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|\n");
  for (const Row& row : r.rows) {
    std::printf("| %s | %.2f GiB | %s | %d | %.1f %% | %s | %.2f ± %.2f |", r.name.c_str(),
                static_cast<double>(r.bytes) / 1073741824.0, short_count(r.parameters).c_str(), r.threads,
                100 * row.sparsity, row.test.c_str(), row.mean_rate(), row.rate_deviation());
    if (row.bytes > 0) {
      std::printf(" %.1f | %.2f | %.1f %% | %.3f | %.3f |\n", row.bytes * 1e-6,
                  row.bytes * row.mean_rate() * 1e-9, 100 * r.bandwidth_share(row), r.speedup(row),
                  row.dense_bytes / row.bytes);
    } else {
      std::printf(" | | | %.3f | |\n", r.speedup(row));
    }
  }
}

nlohmann::ordered_json to_json(const Report& r) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Row& row : r.rows) {
    std::vector<double> sorted = row.seconds;
    nlohmann::ordered_json j = {{"version", LAROSA_VERSION_TEXT},
                                {"backend", r.backend},
                                {"model", r.name},
                                {"model_size", r.bytes},
                                {"model_n_params", r.parameters},
                                {"n_threads", r.threads},
                                {"sparsity", row.sparsity},
                                {"test", row.test},
                                {"n_tokens", row.tokens},
                                {"avg_ts", row.mean_rate()},
                                {"stddev_ts", row.rate_deviation()},
                                {"median_seconds", median(row.seconds)},
                                {"speedup", r.speedup(row)},
                                {"read_bandwidth_gbs", median(r.bandwidth)}};
    if (row.bytes > 0) {
      j["bytes_per_token"] = row.bytes;
      j["gbs"] = row.bytes * row.mean_rate() * 1e-9;
      j["bandwidth_share"] = r.bandwidth_share(row);
      j["ideal_speedup"] = row.dense_bytes / row.bytes;
    }
    j["samples_ts"] = row.rates();
    rows.push_back(j);
  }
  return rows;
}

void print_csv(const Report& r) {
  bool first = true;
  const nlohmann::ordered_json rows = to_json(r);
  const nlohmann::ordered_json* widest = &rows[0];
  for (const auto& row : rows) widest = row.size() > widest->size() ? &row : widest;
  const auto line = [&](const std::function<std::string(const std::string&)>& cell) {
    std::string text;
    for (const auto& [key, value] : widest->items()) {
      if (key != "samples_ts") text += (text.empty() ? "" : ",") + cell(key);
    }
    std::printf("%s\n", text.c_str());
  };
  for (const auto& row : rows) {
    if (first) line([](const std::string& key) { return key; });
    first = false;
    line([&](const std::string& key) { return row.contains(key) ? row[key].dump() : std::string(); });
  }
}

void save_random(const Flags& f, ThreadPool& pool) {
  Progress progress("random weights", 1000, !f.machine.no_progress);
  write_random_checkpoint(f.config, f.save, {dtype_of(f.dtype)}, f.shard_mb * 1000000, pool,
                          [&](int64_t done, int64_t total) {
                            throw_if_interrupted();
                            progress.update(done * 1000 / std::max<int64_t>(total, 1));
                          });
  std::fprintf(stderr, "bench: wrote %s\n", f.save.c_str());
}

/// The readings to compare, the dense one first.
std::vector<Reading> load(const Flags& f, Model& model, ThreadPool& pool) {
  if (!f.random_weights) {
    model = load_model(f.model);
    if (!f.sparsity.empty())
      fail("--sparsity: a stored model is timed as it is; give --config FILE --random-weights to try others");
    std::vector<Reading> readings = {dense_reading(model)};
    if (is_larosa_dir(f.model)) readings.push_back(reading_of(model));
    return readings;
  }
  const ModelConfig config = parse_config(read_json(f.config), f.config);
  const std::vector<double> sparsity = f.sparsity.empty() ? std::vector<double>{0.5} : f.sparsity;
  std::vector<Plan> plans;
  for (double s : sparsity) plans.push_back(plan_of(config, f.method, s));
  std::fprintf(stderr, "bench: making %s random weights\n", short_count(parameter_count(config)).c_str());
  model = make_random_model(config, plans[0], {dtype_of(f.dtype)}, pool);
  std::vector<Reading> readings = {dense_reading(model)};
  const Reading first = reading_of(model);
  for (size_t i = 0; i < plans.size(); ++i) {
    if (sparsity[i] == 0) continue;  // the dense reading stands for it
    readings.push_back(first);
    readings.back().plans = plans[i].layers;
  }
  return readings;
}

int run(const Flags& f) {
  if (f.model.empty() == f.config.empty()) fail("give either a model directory or --config FILE");
  if (f.config.empty() == f.random_weights) fail("--config FILE and --random-weights belong together");
  if (!f.save.empty() && f.config.empty()) fail("--save needs --config FILE --random-weights");
  if (f.prompt == 0 && f.gen == 0) fail("--prompt 0 --gen 0: nothing to time");
  catch_interrupts();
  Machine machine = make_machine(f.machine);
  if (!f.save.empty()) {
    save_random(f, *machine.pool);
    return 0;
  }
  Model model;
  const std::vector<Reading> readings = load(f, model, *machine.pool);
  if (f.depth + std::max(f.prompt, f.gen) > model.config.context)
    fail("--depth ", f.depth, " and ", std::max(f.prompt, f.gen), " tokens: the model's context is ",
         model.config.context);
  const Report report = measure(f, model, readings, machine);
  if (f.format == "md") print_md(report);
  if (f.format == "json") std::printf("%s\n", json_text(to_json(report)).c_str());
  if (f.format == "csv") print_csv(report);
  return 0;
}

}  // namespace

std::function<int()> setup_bench(CLI::App& app) {
  auto f = std::make_shared<Flags>();
  const auto count = CLI::Range(int64_t{0}, int64_t{1} << 24);
  app.add_option("model,-m,--model", f->model,
                 "Model directory: timed dense, and sparse if sparsify wrote it");
  app.add_option("--config", f->config, "A config.json: its shape is timed with random weights");
  app.add_flag("--random-weights", f->random_weights, "Make random weights (with --config)");
  app.add_option("--save", f->save,
                 "Write the random weights to this directory, as Hugging Face would, and time nothing");
  app.add_option("--shard-mb", f->shard_mb, "Most megabytes of a shard that --save writes")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  app.add_option("--dtype", f->dtype, "Type of the random weights")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}))
      ->capture_default_str();
  app.add_option("--sparsity", f->sparsity, "Weight bytes not read, with --config (default: 0.5); 0 is dense")
      ->delimiter(',');
  app.add_option("--method", f->method, "Whose plan the random weights are read by")->capture_default_str();
  app.add_option("-p,--prompt", f->prompt, "Tokens of the prompt test; 0: none")
      ->check(count)
      ->capture_default_str();
  app.add_option("-n,--gen", f->gen, "Tokens of the generation test; 0: none")
      ->check(count)
      ->capture_default_str();
  app.add_option("-d,--depth", f->depth, "Tokens that stand in the context before")
      ->check(count)
      ->capture_default_str();
  app.add_option("-r,--reps", f->reps, "Repetitions; the readings alternate within each")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}))
      ->capture_default_str();
  app.add_option("-o,--output", f->format, "Format of the table")
      ->check(CLI::IsMember({"md", "csv", "json"}))
      ->capture_default_str();
  app.add_option("--kv", f->kv, "Type of the key/value cache")
      ->check(CLI::IsMember({"f32", "f16"}))
      ->capture_default_str();
  f->machine.declare(app);
  return [f] { return run(*f); };
}

}  // namespace larosa
