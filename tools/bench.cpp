// larosa bench: how fast a model, or any shape with random weights, runs on this machine.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "backend/profile.h"
#include "base/error.h"
#include "base/progress.h"
#include "bench_report.h"
#include "calib/methods.h"
#include "command.h"
#include "engine/engine_data.h"
#include "io/files.h"
#include "io/json.h"
#include "model/decoder.h"
#include "model/random.h"
#include "text/tokenizer.h"

namespace larosa {
namespace {

struct Flags {
  std::string model, config, save, file, format = "md", method = "larosa", weights = "bf16", adapter_weights,
                                         head_weights, kv = "f32";
  bool random_weights = false, ops = false;
  int64_t prompt = 512, reps = 5, prompts = 0, shard_mb = 5000;
  std::vector<int64_t> gens = {128}, depths = {0};
  std::vector<int> threads = {0};  // 0: one per available core
  std::vector<double> sparsity = {0.5};
  MachineOptions machine;

  int64_t deepest() const { return *std::ranges::max_element(depths); }
  /// Tokens of the longest test.
  int64_t longest() const { return std::max(prompt, *std::ranges::max_element(gens)); }
};

/// How the weights of one model are read. Several readings share the memory, so that they differ by nothing
/// else.
struct Reading {
  std::string method = "dense";
  bool sparse = false;
  std::vector<LayerPlan> plans;
  std::vector<std::vector<GroupData>> groups;
  std::vector<std::array<Adapter, 2>> adapters;  // in the middle, at the end
};

Reading reading_of(const Model& model) {
  Reading reading;
  reading.method = model.plan.method;
  reading.sparse = true;
  for (const Layer& layer : model.layers) {
    reading.plans.push_back(layer.plan);
    reading.groups.push_back(layer.groups);
    reading.adapters.push_back({layer.middle, layer.adapter});
  }
  return reading;
}

/// Every channel and no adapter: what the model costs without larosa.
Reading dense_reading(const Model& model) {
  const size_t layers = model.layers.size();
  const LayerPlan plan = dense_layer();
  return {"dense", false, std::vector(layers, plan),
          std::vector(layers, std::vector<GroupData>(plan.groups.size())),
          std::vector<std::array<Adapter, 2>>(layers)};
}

void use(Model& model, const Reading& reading) {
  for (size_t l = 0; l < model.layers.size(); ++l) {
    model.layers[l].plan = reading.plans[l];
    model.layers[l].groups = reading.groups[l];
    model.layers[l].middle = reading.adapters[l][0];
    model.layers[l].adapter = reading.adapters[l][1];
  }
}

/// What the flags say about random weights.
RandomOptions random_options(const Flags& f) {
  RandomOptions options{dtype_of(f.weights)};
  if (!f.adapter_weights.empty()) options.adapters = dtype_of(f.adapter_weights);
  if (!f.head_weights.empty()) options.head = dtype_of(f.head_weights);
  return options;
}

Plan plan_of(const ModelConfig& config, const std::string& method, double sparsity) {
  Choice choice;
  choice.sparsity = sparsity;
  if (find_method(method).wants(choice).magnitudes)
    fail("--method ", method, ": its cuts come from a calibration text, random weights have none");
  return plan_model(find_method(method), config, choice);
}

uint64_t next_random(uint64_t& state) {
  return state = state * 6364136223846793005ull + 1442695040888963407ull;
}
int32_t random_token(uint64_t& state, const ModelConfig& config) {
  return static_cast<int32_t>((next_random(state) >> 33) % static_cast<uint64_t>(config.vocab));
}

/// What `--prompts` reads, as long as the deepest and longest test: evenly spread stretches of a text, each
/// behind the token that starts one, or random tokens of a seed each. Needs no weights, so that a text that
/// will not do is refused before gigabytes are loaded.
std::vector<std::vector<int32_t>> make_prompts(const Flags& f, const ModelConfig& config) {
  const auto length = static_cast<size_t>(f.deepest() + f.longest()), count = static_cast<size_t>(f.prompts);
  std::vector<std::vector<int32_t>> prompts(count);
  if (f.file.empty()) {
    for (uint64_t seed = 0; seed < count; ++seed) {
      uint64_t state = seed << 32;
      for (size_t i = 0; i < length; ++i) prompts[seed].push_back(random_token(state, config));
    }
    return prompts;
  }
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  const std::vector<int32_t> text = tokenizer.encode(read_file(f.file), false);
  if (text.size() < length + count - 1)
    fail(f.file, ": ", text.size(), " tokens, ", count, " different prompts of ", length, " need ",
         length + count - 1);
  for (size_t p = 0; p < count; ++p) {
    const size_t first = (text.size() - length) * p / (count - 1);
    if (tokenizer.adds_special() && tokenizer.bos() >= 0) prompts[p].push_back(tokenizer.bos());
    const size_t rest = length - prompts[p].size();
    prompts[p].insert(prompts[p].end(), text.begin() + static_cast<std::ptrdiff_t>(first),
                      text.begin() + static_cast<std::ptrdiff_t>(first + rest));
    for (const int32_t id : prompts[p]) {
      if (id >= config.vocab)
        fail(f.model, ": its tokenizer makes token id ", id, " of ", f.file,
             ", outside the model's vocabulary of ", config.vocab);
    }
  }
  return prompts;
}

/// One timeline whose positions are written again and again.
class Timeline {
 public:
  Timeline(const Model& model, Backend& backend, int64_t capacity, DType kv)
      : model_(model),
        backend_(backend),
        decoder_(model.config, backend),
        cache_(backend.make_kv_cache(
            {model.config.layers, model.config.kv_heads, model.config.head_dim, capacity, kv})),
        hidden_(backend.allocate(Decoder::kBatch * model.config.dim * kFloat)),
        logits_(backend.allocate(model.config.vocab * kFloat)) {}

  /// Keys and values at positions [0, count), for the price of writing them: each attends to itself alone.
  void fill(int64_t count) {
    const ModelConfig& c = model_.config;
    std::vector<float> values(static_cast<size_t>(Decoder::kBatch * (2 * c.q_dim() + c.kv_dim())));
    for (float& v : values) v = static_cast<float>(next_random(state_) >> 40) * 0x1p-23f - 1;
    const auto size = static_cast<int64_t>(values.size());
    const auto memory = backend_.allocate(size * kFloat);
    auto* const there = static_cast<float*>(memory.get());
    backend_.write(values.data(), Mat(there, 1, size));
    for (int64_t first = 0; first < count; first += Decoder::kBatch) {
      throw_if_interrupted();
      const int64_t rows = std::min(Decoder::kBatch, count - first);
      const Mat q(there, rows, c.q_dim()), out(q.row(rows), rows, c.q_dim()),
          k(out.row(rows), rows, c.kv_dim());
      for (int64_t l = 0; l < c.layers; ++l) backend_.attend(q, k, k, *cache_, l, first, 1, out);
    }
  }

  /// From now on position i reads text[i], which must live on, instead of a random token.
  void follow(std::span<const int32_t> text) { text_ = text; }

  /// `count` tokens at `pos` …, one after another or together, with the logits after the last of each step;
  /// waits for the result.
  void feed(int64_t pos, int64_t count, bool together, const Pass& pass) {
    const int64_t step = together ? Decoder::kBatch : 1;
    for (int64_t first = 0; first < count; first += step) {
      throw_if_interrupted();
      const int64_t rows = std::min(step, count - first);
      tokens_.resize(static_cast<size_t>(rows));
      for (int64_t i = 0; i < rows; ++i) {
        tokens_[static_cast<size_t>(i)] =
            text_.empty() ? random_token(state_, model_.config) : text_[static_cast<size_t>(pos + first + i)];
      }
      const Mat hidden(static_cast<float*>(hidden_.get()), rows, model_.config.dim);
      decoder_.forward(model_, tokens_, *cache_, pos + first, pass, hidden);
      if (first + rows == count || !together)
        decoder_.logits(model_, hidden.slice(rows - 1, 1),
                        Mat(static_cast<float*>(logits_.get()), 1, model_.config.vocab));
    }
    backend_.synchronize();
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  const Model& model_;
  Backend& backend_;
  Decoder decoder_;
  std::unique_ptr<KvCache> cache_;
  std::shared_ptr<void> hidden_, logits_;
  std::vector<int32_t> tokens_;
  std::span<const int32_t> text_;
  uint64_t state_ = 1;
};

/// Words by which `--ops` tells one operation's calls apart.
void name_tensors(const Model& model, Profile& profile) {
  profile.name(model.outer.head.data, "head");
  profile.name(model.outer.norm_out, "norm_out");
  for (const Layer& layer : model.layers) {
    const LayerWeights& w = layer.weights;
    for (Projection p : kProjections) profile.name(w[p].data, projection_name(p));
    profile.name(w.norm_attn, "norm_attn");
    profile.name(w.norm_mlp, "norm_mlp");
    profile.name(w.norm_q, "norm_q");
    profile.name(w.norm_k, "norm_k");
    for (const Adapter* adapter : {&layer.middle, &layer.adapter}) {
      profile.name(adapter->weight.data, "adapter");
      profile.name(adapter->top.data, "adapter top");
    }
    for (size_t g = 0; g < layer.groups.size(); ++g) {
      const char* site = site_name(site_of(layer.plan.groups[g].projections[0]));
      profile.name(layer.groups[g].scale, site);
      profile.name(layer.groups[g].basis.data, site);
      for (const LowRank& low : layer.groups[g].low) {
        profile.name(low.in.data, "low_in");
        profile.name(low.out.data, "low_out");
      }
    }
  }
}

/// A number of threads to time: the backend on them, and a timeline there.
struct Station {
  Station(const Flags& f, const Model& model, int threads, int64_t capacity)
      : machine([&] {
          MachineOptions options = f.machine;
          options.threads = threads;
          return make_machine(options);
        }()),
        profiled(f.ops ? make_profiled_backend(*machine.backend, profile) : nullptr),
        timeline(model, profiled ? *profiled : *machine.backend, capacity, kv_dtype(f.kv)) {}

  Machine machine;
  Profile profile;
  std::unique_ptr<Backend> profiled;
  Timeline timeline;
};

/// How the row of the same index is timed.
struct Task {
  size_t reading, station;
};

/// What a reading's row says before it is timed.
Row make_row(const Flags& f, const Model& model, const Reading& reading, int64_t depth, int64_t tokens,
             bool prompt) {
  const TokenBytes bytes = token_bytes(model, kv_dtype(f.kv));
  Row row;
  row.method = reading.method;
  row.dense = !reading.sparse;
  row.sparsity = bytes.sparsity();
  row.depth = depth;
  row.tokens = tokens;
  row.prompt = prompt;
  const int64_t positions = depth + tokens / 2;  // the cache's mean length
  row.bytes = prompt ? 0 : static_cast<double>(bytes.sparse(positions));
  row.dense_bytes = prompt ? 0 : static_cast<double>(bytes.dense(positions));
  return row;
}

/// One repetition. Prompts run dense, as in `run`. With a text, what stands before is read from it.
void time_row(Row& row, Station& station, std::span<const int32_t> text) {
  station.timeline.follow(text);
  if (!text.empty()) station.timeline.feed(0, row.depth, true, Pass{true, nullptr});
  station.profile.take();
  const auto start = std::chrono::steady_clock::now();
  station.timeline.feed(row.depth, row.tokens, row.prompt, Pass{row.prompt, nullptr});
  row.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  std::vector<Timing> timings = station.profile.take();
  row.operations.resize(timings.size());
  for (size_t i = 0; i < timings.size(); ++i) {
    OperationRow& o = row.operations[i];
    o.name = timings[i].name;
    o.calls = timings[i].calls;
    o.bytes = timings[i].bytes;
    o.seconds.push_back(timings[i].seconds);
  }
}

/// A generation or a prompt of so many tokens.
struct Test {
  int64_t tokens;
  bool prompt;
};

Report measure(const Flags& f, Model& model, const std::vector<Reading>& readings,
               const std::vector<std::vector<int32_t>>& prompts) {
  Report report;
  report.parameters = parameter_count(model.config);
  report.name = model.config.architecture + " " + short_count(report.parameters) + " " +
                dtype_name(model.layers[0].weights[Projection::wq].dtype);
  report.operations = f.ops;
  report.prompts = f.prompts;
  use(model, readings[0]);
  report.bytes = model_bytes(model);
  const int64_t deepest = f.deepest();
  std::vector<Test> tests;
  if (f.prompt > 0) tests.push_back({f.prompt, true});
  for (const int64_t gen : f.gens)
    if (gen > 0) tests.push_back({gen, false});
  std::vector<std::unique_ptr<Station>> stations;
  std::vector<Task> tasks;
  for (size_t s = 0; s < f.threads.size(); ++s) {
    stations.push_back(std::make_unique<Station>(f, model, f.threads[s], deepest + f.longest()));
    Station& station = *stations[s];
    for (const int64_t depth : f.depths) {
      for (const auto& [tokens, prompt] : tests) {
        for (size_t i = 0; i < readings.size(); ++i) {
          use(model, readings[i]);
          tasks.push_back({i, s});
          Row& row = report.rows.emplace_back(make_row(f, model, readings[i], depth, tokens, prompt));
          row.backend = station.machine.backend->describe();
          row.threads = station.machine.pool->size();
        }
      }
    }
    station.timeline.fill(deepest);
    for (const Reading& reading : readings) {  // touches every page and every code path once
      use(model, reading);
      name_tensors(model, station.profile);
      for (const auto& [tokens, prompt] : tests) {
        if (prompt) station.timeline.feed(0, std::min<int64_t>(tokens, 16), true, Pass{true, nullptr});
        if (!prompt) station.timeline.feed(deepest, std::min<int64_t>(tokens, 2), false, Pass{});
      }
    }
  }
  constexpr int64_t kBandwidthBytes = int64_t{1} << 29;
  const int64_t reps = f.reps * std::max<int64_t>(f.prompts, 1);
  Progress progress("bench", reps * static_cast<int64_t>(tasks.size()), !f.machine.no_progress);
  for (int64_t rep = 0, done = 0; rep < reps; ++rep) {
    std::span<const int32_t> text;
    if (!prompts.empty()) text = prompts[static_cast<size_t>(rep) % prompts.size()];
    // Before and after every row: a shared host's bandwidth can double or halve from one second to the next.
    double before = 0;
    for (size_t t = 0; t < tasks.size(); ++t) {
      Station& station = *stations[tasks[t].station];
      const auto bandwidth = [&] { return station.machine.backend->measure_bandwidth(kBandwidthBytes); };
      if (t == 0 || tasks[t].station != tasks[t - 1].station) before = bandwidth();
      use(model, readings[tasks[t].reading]);
      Row& row = report.rows[t];
      time_row(row, station, text);
      const double after = bandwidth();
      row.bandwidth.push_back((before + after) / 2);
      before = after;
      progress.update(++done);
    }
  }
  return report;
}

void save_random(const Flags& f, ThreadPool& pool) {
  Progress progress("random weights", 1000, !f.machine.no_progress);
  write_random_checkpoint(f.config, f.save, {dtype_of(f.weights)}, f.shard_mb * 1000000, pool,
                          [&](int64_t done, int64_t total) {
                            throw_if_interrupted();
                            progress.update(done * 1000 / std::max<int64_t>(total, 1));
                          });
  std::fprintf(stderr, "bench: wrote %s\n", f.save.c_str());
}

/// The readings to compare, the dense one first; the model in the memory of `home`. plans: of random weights,
/// by sparsity.
std::vector<Reading> load(const Flags& f, const ModelConfig& config, const std::vector<Plan>& plans,
                          Model& model, Machine& home) {
  if (!f.random_weights) {
    model = load_model(f.model);
    place(model, *home.backend);
    std::vector<Reading> readings = {dense_reading(model)};
    const auto as_read = [](const Layer& layer) { return layer.plan == dense_layer(); };
    if (!std::ranges::all_of(model.layers, as_read)) readings.push_back(reading_of(model));
    return readings;
  }
  std::fprintf(stderr, "bench: making %s random weights\n", short_count(parameter_count(config)).c_str());
  model = make_random_model(config, plans[0], random_options(f), *home.pool);
  place(model, *home.backend);
  std::vector<Reading> readings = {dense_reading(model)};
  const Reading first = reading_of(model);
  for (size_t i = 0; i < plans.size(); ++i) {
    if (f.sparsity[i] == 0) continue;  // the dense reading stands for it
    readings.push_back(first);
    readings.back().plans = plans[i].layers;
  }
  return readings;
}

int run(const Flags& f, const CLI::App& app) {
  if (f.model.empty() == f.config.empty()) fail("give either a model directory or --config FILE");
  if (f.config.empty() == f.random_weights) fail("--config FILE and --random-weights belong together");
  if (!f.save.empty() && f.config.empty()) fail("--save needs --config FILE --random-weights");
  if (!f.save.empty() && quantised(dtype_of(f.weights)))
    fail("--weights ", f.weights, ": --save writes f32, f16 or bf16");
  for (const char* option : {"--sparsity", "--weights", "--adapter-weights", "--head-weights", "--method"}) {
    if (!f.random_weights && app.get_option(option)->count() > 0)
      fail(option, ": a stored model is timed as it is; give --config FILE --random-weights to try others");
  }
  if (f.longest() == 0) fail("--prompt 0 --gen 0: nothing to time");
  if (!f.file.empty() && f.prompts == 0) fail("--file ", f.file, ": belongs to --prompts N");
  if (!f.file.empty() && f.random_weights)
    fail("--file ", f.file, ": random weights have no tokenizer; without it prompts are random tokens");
  catch_interrupts();
  if (!f.save.empty()) {
    ThreadPool pool(f.threads[0]);
    save_random(f, pool);
    return 0;
  }
  const ModelConfig config =
      f.random_weights ? parse_config(read_json(f.config), f.config) : load_config(f.model);
  std::vector<Plan> plans;
  if (f.random_weights)
    for (const double s : f.sparsity) plans.push_back(plan_of(config, f.method, s));
  if (f.deepest() + f.longest() > config.context)
    fail("--depth ", f.deepest(), " and ", f.longest(), " tokens: the model's context is ", config.context);
  const std::vector<std::vector<int32_t>> prompts = make_prompts(f, config);
  MachineOptions options = f.machine;
  options.threads = *std::max_element(f.threads.begin(), f.threads.end());
  Machine home = make_machine(options);  // whose memory the model is in
  Model model;
  const std::vector<Reading> readings = load(f, config, plans, model, home);
  print(measure(f, model, readings, prompts), f.format);
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
  const auto types = CLI::IsMember({"f32", "f16", "bf16", "int8", "int4"});
  app.add_option("--weights", f->weights, "Type of the random weights")->check(types)->capture_default_str();
  app.add_option("--adapter-weights", f->adapter_weights,
                 "Type of the adapters (default: int8 beside int8 and int4, else that of the weights)")
      ->check(types);
  app.add_option("--head-weights", f->head_weights,
                 "Type of the output head and the embedding (default: as the adapters')")
      ->check(types);
  app.add_option("--sparsity", f->sparsity, "Weight bytes not read, with --config (default: 0.5); 0 is dense")
      ->delimiter(',');
  app.add_option("--method", f->method, "Whose plan the random weights are read by")->capture_default_str();
  app.add_option("-p,--prompt", f->prompt, "Tokens of the prompt test; 0: none")
      ->check(count)
      ->capture_default_str();
  app.add_option("-n,--gen", f->gens, "Tokens of the generation test, several by commas; 0: none")
      ->delimiter(',')
      ->check(count)
      ->capture_default_str();
  app.add_option("-d,--depth", f->depths, "Tokens that stand in the context before, several by commas")
      ->delimiter(',')
      ->check(count)
      ->capture_default_str();
  app.add_option("--prompts", f->prompts,
                 "Different prompts, each timed -r times; how much tokens/s vary from one to the next")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 16));
  app.add_option("-f,--file", f->file,
                 "Text whose stretches the prompts are (- for standard input; without: random tokens)");
  app.add_option("-r,--reps", f->reps, "Repetitions; the readings alternate within each")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}))
      ->capture_default_str();
  app.add_option("-o,--output", f->format, "Format of the table")
      ->check(CLI::IsMember({"md", "csv", "json"}))
      ->capture_default_str();
  app.add_option("--kv", f->kv, "Type of the key/value cache")
      ->check(CLI::IsMember({"f32", "f16", "int8"}))
      ->capture_default_str();
  app.add_flag("--ops", f->ops, "Time every operation: calls, time, share of the token, bytes and GB/s");
  f->machine.declare(app, &f->threads);
  return [f, &app] { return run(*f, app); };
}

}  // namespace larosa
