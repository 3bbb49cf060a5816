// The CUDA backend's decoding products and Top-K, beside cuBLAS and the bandwidth of copies in the same run:
// Markdown on standard output. Products go through the backend's door as the decoder issues them
// (decoding.h), norms and selections inside; weights come from memory, in turn, and no two products in a row
// read the same row.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "backend/cuda/kernels.h"
#include "backend/cuda/storage.h"
#include "backend/devices.h"
#include "base/error.h"
#include "base/median.h"
#include "base/thread_pool.h"
#include "cublas_graph.h"
#include "decoding.h"
#include "io/json.h"

namespace larosa {
namespace {

using cuda::check;

struct Flags {
  std::vector<std::string> shapes = {"llama-2-7b", "llama-3.1-8b", "qwen2.5-7b"},
                           types = {"bf16", "int8", "int4"};
  bool quick = false;

  std::vector<double> keeps() const {
    return quick ? std::vector{1.0, 0.5} : std::vector{1.0, 0.75, 0.6, 0.5, 0.25};
  }
  double sample_seconds() const { return quick ? 2e-3 : 5e-3; }
  int rounds() const { return quick ? 3 : 7; }
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Times work on the device by the host's clock: many calls around one synchronisation.
class Stopwatch {
 public:
  Stopwatch(Backend& backend, const Flags& flags) : backend_(backend), flags_(flags) {}

  /// Seconds of issue(0) … issue(count − 1), over and over again until a sample is long enough.
  template <class Issue>
  double sample(int64_t count, const Issue& issue) {
    const double once = passes(1, count, issue);
    const double wanted = std::clamp(std::ceil(flags_.sample_seconds() / once), 1.0, 1000.0);
    return passes(static_cast<int64_t>(wanted), count, issue);
  }
  /// Median of several, the first pass not counted.
  template <class Issue>
  double median_sample(int64_t count, const Issue& issue) {
    passes(1, count, issue);
    std::vector<double> samples;
    for (int i = 0; i < flags_.rounds(); ++i) samples.push_back(sample(count, issue));
    return median(samples);
  }
  /// Seconds that the host takes to issue them: the device waits for it where that is longer.
  template <class Issue>
  double issuing(int64_t count, const Issue& issue) {
    backend_.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < count; ++i) issue(i);
    const double seconds = seconds_since(start);
    backend_.synchronize();
    return seconds;
  }

 private:
  template <class Issue>
  double passes(int64_t times, int64_t count, const Issue& issue) {
    backend_.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t t = 0; t < times; ++t)
      for (int64_t i = 0; i < count; ++i) issue(i);
    backend_.synchronize();
    return seconds_since(start) / static_cast<double>(times);
  }

  Backend& backend_;
  const Flags& flags_;
};

/// "50 %"
std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.0f %%", 100 * share);
  return text;
}

/// Each product alone.
void print_steps(const Flags& f, Backend& backend, const Weights& weights, Decoding& decoding,
                 double copies) {
  std::printf(
      "\nEach product, one layer's after another's, with its norm and selection inside as in decoding; "
      "\"ready\": from a row that stands in memory, with its zeros. GB/s of the weights that are read, "
      "shares of the copies'.\n\n"
      "| product | kept | MB | us | GB/s | of copies | us, ready | of copies, ready |\n"
      "|---|--:|--:|--:|--:|--:|--:|--:|\n");
  Stopwatch watch(backend, f);
  const double layers = static_cast<double>(weights.layers());
  for (const Step step : kSteps) {
    for (const double keep : f.keeps()) {
      const double bytes = weights.bytes(step, keep);
      const double us = 1e6 / layers * watch.median_sample(weights.layers(), [&](int64_t l) {
        decoding.issue(step, l, keep);
      });
      decoding.prepare(step, keep);
      const double ready = 1e6 / layers * watch.median_sample(weights.layers(), [&](int64_t l) {
        decoding.issue_ready(step, l);
      });
      std::printf("| %s | %s | %.2f | %.2f | %.0f | %.1f %% | %.2f | %.1f %% |\n", step_name(step),
                  percent(keep).c_str(), bytes * 1e-6, us, bytes * 1e-3 / us, 0.1 * bytes / us / copies,
                  ready, 0.1 * bytes / ready / copies);
      std::fflush(stdout);
    }
  }
}

/// The products of a token as cuBLAS takes them, with the products of one row joined or not.
std::vector<DenseProduct> cublas_products(const ModelConfig& config, const Weights& weights, int64_t layers,
                                          bool joined) {
  std::vector<DenseProduct> all;
  for (int64_t l = 0; l < std::min(layers, weights.layers()); ++l) {
    for (const Step step : kSteps) {
      DenseProduct sum;
      for (Projection p : projections_of(step)) {
        const Weight w = weights.at(l, p);  // they lie side by side, but for odd shapes' alignment
        if (!joined) all.push_back({w.data, w.in, w.out});
        sum = {sum.weight ? sum.weight : w.data, w.in, sum.out + w.out};
      }
      if (joined) all.push_back(sum);
    }
  }
  CHECK(!all.empty() && all[0].in == config.dim);
  return all;
}

/// One way to do a token's products: all of them in a CUDA graph by cuBLAS, or through the backend.
struct Contender {
  std::string name;
  double keep = 1, bytes = 0;
  std::unique_ptr<Graph> graph = {};  // or null: the backend
  std::vector<double> seconds = {};   // per round
};

/// cuBLAS with the products of a row joined and apart; says which of its ways are the fastest.
std::vector<Contender> cublas_contenders(Cublas& cublas, const ModelConfig& config, const Weights& weights,
                                         double copies) {
  std::vector<Contender> all;
  std::printf(
      "\ncuBLAS, bf16, one column, float32 sums: its fastest way for each shape, all of the shape's weights "
      "in "
      "one CUDA graph.\n\n| inputs | outputs | way | us | GB/s | of copies |\n|--:|--:|---|--:|--:|--:|\n");
  std::set<std::pair<int64_t, int64_t>> printed;
  for (const bool joined : {true, false}) {
    std::map<std::pair<int64_t, int64_t>, std::vector<DenseProduct>> shapes;
    for (const DenseProduct& p : cublas_products(config, weights, weights.layers(), joined))
      shapes[{p.in, p.out}].push_back(p);
    for (const auto& [shape, products] : shapes) {
      if (!printed.insert(shape).second) continue;
      const CublasWay& way = cublas.fastest(products);
      const double bytes = static_cast<double>(products[0].bytes());
      std::printf("| %ld | %ld | %s | %.2f | %.0f | %.1f %% |\n", static_cast<long>(shape.first),
                  static_cast<long>(shape.second), way.name.c_str(), way.us, bytes * 1e-3 / way.us,
                  0.1 * bytes / way.us / copies);
    }
    const std::vector<DenseProduct> token = cublas_products(config, weights, config.layers, joined);
    Contender c{joined ? "cuBLAS, 4 products a layer" : "cuBLAS, 7 products a layer"};
    for (const DenseProduct& p : token) c.bytes += static_cast<double>(p.bytes());
    c.graph = cublas.record(token);
    all.push_back(std::move(c));
  }
  return all;
}

/// All products of a token in sequence, in turns with each other.
void print_tokens(const Flags& f, Backend& backend, const ModelConfig& config, const Weights& weights,
                  Decoding& decoding, std::vector<Contender> contenders, double copies) {
  const size_t references = contenders.size();
  for (const double keep : f.keeps()) {
    Contender c{keep == 1 ? "dense" : percent(1 - keep) + " sparse", keep};
    for (const Step step : kSteps) c.bytes += static_cast<double>(config.layers) * weights.bytes(step, keep);
    contenders.push_back(std::move(c));
  }
  Stopwatch watch(backend, f);
  for (int round = -1; round < f.rounds(); ++round) {  // the first one is not counted
    for (Contender& c : contenders) {
      double seconds = 0;
      if (c.graph) {
        backend.synchronize();
        seconds = 1e-3 * c.graph->median_ms(f.quick ? 3 : 7);
      } else {
        seconds = watch.sample(1, [&](int64_t) { decoding.issue_token(c.keep); });
      }
      if (round >= 0) c.seconds.push_back(seconds);
    }
  }
  const Contender* best = nullptr;
  for (size_t i = 0; i < references; ++i)
    if (!best || median(contenders[i].seconds) < median(best->seconds)) best = &contenders[i];
  const Contender& dense = contenders[references];
  std::printf(
      "\nAll products of a token, %ld layers in sequence; cuBLAS in one CUDA graph, the backend's issued one "
      "by "
      "one by the host, which takes \"host\" for it. Speed-ups are medians over %d rounds in turns; against "
      "cuBLAS: its faster row.\n\n| | MB | ms | GB/s | of copies | x dense | ideal | x cuBLAS | host, ms |\n"
      "|---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
      static_cast<long>(config.layers), f.rounds());
  for (const Contender& c : contenders) {
    const double ms = 1e3 * median(c.seconds), gbs = c.bytes * 1e-6 / ms;
    std::string more;
    if (!c.graph) {
      const double host = 1e3 * watch.issuing(1, [&](int64_t) { decoding.issue_token(c.keep); });
      char text[96];
      std::snprintf(text, sizeof(text), "%.2f", host);
      more = text;
    }
    char against[32] = "";
    if (best) std::snprintf(against, sizeof(against), "%.3f", median_ratio(best->seconds, c.seconds));
    std::printf("| %s | %.0f | %.3f | %.0f | %.1f %% | %.3f | %.3f | %s | %s |\n", c.name.c_str(),
                c.bytes * 1e-6, ms, gbs, 100 * gbs / copies, median_ratio(dense.seconds, c.seconds),
                dense.bytes / c.bytes, against, more.c_str());
  }
  std::fflush(stdout);
}

/// A device stream that is kept busy while launches are queued, so that the host's time is not counted.
class BusyStream {
 public:
  BusyStream() : stream_(cuda::make_stream(0)) {
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&stop_), "cudaEventCreate");
    check(cudaMemset(from_.at_least(Weights::kPool), 0, Weights::kPool), "cudaMemset");
    to_.at_least(Weights::kPool);
  }
  ~BusyStream() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream_.stream);
  }
  BusyStream(const BusyStream&) = delete;
  BusyStream& operator=(const BusyStream&) = delete;

  /// Median µs of a call of issue(stream, i), `count` of them in a row; a few hundred fit into the queue.
  template <class Issue>
  double median_us(int64_t count, const Issue& issue) {
    constexpr int kTimes = 7, kCopies = 6;  // some 3 ms of copies
    std::vector<double> us;
    for (int t = 0; t <= kTimes; ++t) {
      for (int i = 0; i < kCopies; ++i) {
        check(cudaMemcpyAsync(to_.get<void>(), from_.get<void>(), Weights::kPool, cudaMemcpyDeviceToDevice,
                              stream_.stream),
              "cudaMemcpyAsync");
      }
      check(cudaEventRecord(start_, stream_.stream), "cudaEventRecord");
      for (int64_t i = 0; i < count; ++i) issue(stream_, i);
      check(cudaEventRecord(stop_, stream_.stream), "cudaEventRecord");
      check(cudaEventSynchronize(stop_), "cudaEventSynchronize after launches");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, start_, stop_), "cudaEventElapsedTime");
      if (t > 0) us.push_back(1e3 * static_cast<double>(ms) / static_cast<double>(count));
    }
    return median(us);
  }

 private:
  const cuda::Stream stream_;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  cuda::Buffer from_, to_;
};

/// Top-K where no product makes it on the way.
void print_topk(const Flags& f, Backend& backend) {
  constexpr int64_t kLaunches = 256;
  const std::vector<int64_t> lengths = {4096, 8192, 11008, 14336, 18944, 28672};
  std::printf(
      "\n## Top-K as a launch of its own\n\nOne row with score weights. \"device\": launches "
      "queued "
      "behind a copy, between two events; \"backend\": topk after topk through the door, which the host "
      "issues.\n\n| values | kept | us, device | us, backend |\n|--:|--:|--:|--:|\n");
  const Inputs inputs(backend, lengths.back());
  const auto kept = backend.make_selection(1, lengths.back());
  const cuda::StoredRow row(lengths.back());
  BusyStream busy;
  Stopwatch watch(backend, f);
  for (const int64_t n : lengths) {
    for (const double keep : {0.75, 0.5, 0.25}) {
      const int64_t count = static_cast<int64_t>(std::lround(keep * static_cast<double>(n)));
      cuda::Input rule;
      rule.select = cuda::Selects::topk;
      rule.keep = static_cast<int>(count);
      rule.scale = inputs.scale();
      const double device = busy.median_us(kLaunches, [&](const cuda::Stream& s, int64_t i) {
        cuda::select(s, inputs.row(i, n), rule, row.masked, row.kept);
      });
      // A selection that waits is launched when the next one comes.
      const double door = 1e6 / kLaunches * watch.median_sample(kLaunches, [&](int64_t i) {
        backend.topk(inputs.row(i, n), inputs.scale(), count, *kept);
      });
      std::printf("| %ld | %s | %.2f | %.2f |\n", static_cast<long>(n), percent(keep).c_str(), device, door);
      std::fflush(stdout);
    }
  }
}

/// What the next token is drawn from, to the host, which waits for it.
void print_largest(const Flags& f, Backend& backend) {
  constexpr int64_t kTimes = 256, kLongest = 151936;
  std::printf(
      "\n## The largest entries of a row\n\nCall after call through the door, with the host's wait; "
      "\"row\": all of it read, and those found on the host.\n\n"
      "| entries | largest | us | us, row |\n|--:|--:|--:|--:|\n");
  const Inputs inputs(backend, kLongest);
  const std::unique_ptr<Backend> host = make_ref_backend();
  std::vector<float> row(kLongest);
  Stopwatch watch(backend, f);
  for (const int64_t n : {int64_t{32000}, int64_t{128256}, kLongest}) {
    for (const size_t count : {1, 40, 104, 256}) {
      std::vector<Candidate> to(count);
      const auto us = [&](const auto& issue) { return 1e6 / kTimes * watch.median_sample(kTimes, issue); };
      const double found = us([&](int64_t i) { backend.largest(inputs.row(i, n), to); });
      const double read = us([&](int64_t i) {
        backend.read(inputs.row(i, n), row.data());
        host->largest(Mat(row.data(), 1, n), to);
      });
      std::printf("| %ld | %zu | %.2f | %.2f |\n", static_cast<long>(n), count, found, read);
      std::fflush(stdout);
    }
  }
}

/// A name in bench/configs, or a file.
ModelConfig read_shape(const std::string& name) {
  const bool file = name.size() > 5 && name.compare(name.size() - 5, 5, ".json") == 0;
  const std::string path = file ? name : "bench/configs/" + name + ".json";
  if (!file && !std::filesystem::exists(path))
    fail("--shape ", name, ": ", path, " is not there (start in the repository, or name a config.json)");
  return parse_config(read_json(path), path);
}

void bench_shape(const Flags& f, const std::string& shape, const ModelConfig& config, DType dtype,
                 ThreadPool& pool) {
  // A backend of its own: it remembers a cut for each of some thousand weights.
  const std::unique_ptr<Backend> backend = make_cuda_backend({});
  const double copies = backend->measure_bandwidth(Weights::kPool);
  const Weights weights(*backend, config, dtype, pool);
  const Inputs inputs(*backend, std::max({config.ffn, config.dim, config.q_dim()}));
  Decoding decoding(*backend, config, weights, inputs);
  std::printf("\n## %s, %s\n\nCopies: %.0f GB/s. Weights of %ld layers in turn.\n", shape.c_str(),
              dtype_name(dtype), copies, static_cast<long>(weights.layers()));
  print_steps(f, *backend, weights, decoding, copies);
  std::unique_ptr<Cublas> cublas;
  std::vector<Contender> contenders;
  if (dtype == DType::bf16) {
    try {
      cublas = std::make_unique<Cublas>(std::max(2 * config.ffn, config.q_dim() + 2 * config.kv_dim()));
      contenders = cublas_contenders(*cublas, config, weights, copies);
    } catch (const Error& e) {
      std::printf("\ncuBLAS is not timed: %s\n", e.what());
      contenders.clear();
    }
  }
  print_tokens(f, *backend, config, weights, decoding, std::move(contenders), copies);
}

int run(const Flags& f) {
  std::string reason;
  if (cuda_devices(reason).empty()) fail("no CUDA device: ", reason);
  std::vector<ModelConfig> configs;
  for (const std::string& shape : f.shapes) configs.push_back(read_shape(shape));
  ThreadPool pool(0);
  {
    const std::unique_ptr<Backend> backend = make_cuda_backend({});
    std::printf("# CUDA kernels\n\n%s\n", backend->describe().c_str());
    print_topk(f, *backend);
    print_largest(f, *backend);
  }
  for (size_t i = 0; i < configs.size(); ++i)
    for (const std::string& type : f.types) bench_shape(f, f.shapes[i], configs[i], dtype_of(type), pool);
  return 0;
}

}  // namespace
}  // namespace larosa

int main(int argc, char** argv) {
  larosa::Flags flags;
  CLI::App app("Times the CUDA backend's decoding products and Top-K, and cuBLAS beside them");
  app.add_option("--shape", flags.shapes, "Names of bench/configs, or files like them, several by commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--types", flags.types, "Types of the weights; cuBLAS stands beside bf16")
      ->delimiter(',')
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8", "int4"}))
      ->capture_default_str();
  app.add_flag("--quick", flags.quick, "Dense and half sparse only, shorter samples");
  CLI11_PARSE(app, argc, argv);
  try {
    return larosa::run(flags);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}
