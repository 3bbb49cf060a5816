// Every operation on the shapes of tests/cases.h. Weights are taken in turn from 512 MiB, so that they come
// from memory as in decoding; the column `of_read` is the share of the read bandwidth measured at the start.
// For sparse products it counts the bytes of kept channels alone: 1 is the ideal speed-up.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "backend/bandwidth.h"
#include "cases.h"

namespace larosa {
namespace {

using namespace cases;
using benchmark::State;

constexpr int64_t kPool = int64_t{512} << 20;

Cpu& cpu(Products products = Products::f32) {
  static const char* const forced = std::getenv("LAROSA_ISA");
  static const std::string isa = forced ? forced : "";  // none: as the machine has it
  static Cpu f32(isa, 0, Products::f32), bf16(isa, 0, Products::bf16);
  return products == Products::f32 ? f32 : bf16;
}

double read_bandwidth() {
  static const double gbps = measure_read_bandwidth(cpu().pool, int64_t{1} << 30);
  return gbps;
}

/// Memory full of 1.0 in bf16 pairs, which is a small normal number as float32 too.
const std::vector<uint16_t>& weights() {
  static const std::vector<uint16_t> memory(static_cast<size_t>(kPool / 2), 0x3c00);
  return memory;
}

/// Weight after weight of one shape from the pool.
class Turns {
 public:
  Turns(Shape shape, DType dtype, Layout layout)
      : weight_{nullptr, nullptr, dtype, layout, shape.in, shape.out} {}
  Weight next() {
    weight_.data = weights().data() + (turn_++ % (kPool / weight_.bytes())) * weight_.bytes() / 2;
    return weight_;
  }

 private:
  Weight weight_;
  int64_t turn_ = 0;
};

void gemv(State& state, Shape shape, DType dtype, Layout layout, double keep) {
  Random random(1);
  const Rows x = Rows(1, shape.in).fill(random), y(1, shape.out);
  const auto kept = cpu()->make_selection(1, shape.in);
  const int64_t count = static_cast<int64_t>(keep * static_cast<double>(shape.in));
  cpu()->topk(x.mat, nullptr, count, *kept);
  Turns turns(shape, dtype, layout);
  for (auto _ : state) {
    const Product product{turns.next(), y.mat, false};
    keep < 1 ? cpu()->sparse_matmul(*kept, std::span(&product, 1))
             : cpu()->matmul(x.mat, std::span(&product, 1));
  }
  const double bytes = static_cast<double>(count * line_bytes(dtype, shape.out));
  using Counter = benchmark::Counter;
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["of_read"] = Counter(bytes * 1e-9 / read_bandwidth(), Counter::kIsIterationInvariantRate);
}

/// The kept outputs of a weight in rows layout.
void outputs(State& state, Shape shape, DType dtype, double keep) {
  Random random(1);
  const Rows x = Rows(1, shape.in).fill(random), score = Rows(1, shape.out).fill(random), y(1, shape.out);
  const auto kept = cpu()->make_selection(1, shape.out);
  const int64_t count = static_cast<int64_t>(keep * static_cast<double>(shape.out));
  cpu()->topk(score.mat, nullptr, count, *kept);
  Turns turns(shape, dtype, Layout::rows);
  for (auto _ : state) cpu()->matmul_outputs(x.mat, *kept, {turns.next(), y.mat, false});
  const double bytes = static_cast<double>(count * line_bytes(dtype, shape.in));
  using Counter = benchmark::Counter;
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["of_read"] = Counter(bytes * 1e-9 / read_bandwidth(), Counter::kIsIterationInvariantRate);
}

void matmul(State& state, int64_t rows, Shape shape, DType dtype, Layout layout, Products products) {
  Random random(1);
  const Rows x = Rows(rows, shape.in, 0).fill(random), y(rows, shape.out, 0);
  Turns turns(shape, dtype, layout);
  for (auto _ : state) {
    const Product product{turns.next(), y.mat, false};
    cpu(products)->matmul(x.mat, std::span(&product, 1));
  }
  const double flops = 2e-9 * static_cast<double>(rows * shape.in * shape.out);
  state.counters["GFLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
}

void topk(State& state, int64_t rows, int64_t dim) {
  Random random(2);
  const Rows x = Rows(rows, dim).fill(random);
  const auto kept = cpu()->make_selection(rows, dim);
  for (auto _ : state) cpu()->topk(x.mat, nullptr, dim / 2, *kept);
}

void norm(State& state, int64_t rows, int64_t dim) {
  Random random(3);
  const Rows x = Rows(rows, dim).fill(random), y(rows, dim);
  for (auto _ : state) cpu()->rms_norm(x.mat, nullptr, 1e-5f, y.mat);
}

void glu(State& state, int64_t rows, int64_t dim) {
  Random random(4);
  const Rows gate = Rows(rows, dim).fill(random), up = Rows(rows, dim).fill(random), mid(rows, dim);
  for (auto _ : state) cpu()->glu(gate.mat, up.mat, {}, mid.mat);
}

void softmax(State& state, int64_t rows, int64_t vocab) {
  Random random(5);
  const Rows x = Rows(rows, vocab).fill(random);
  for (auto _ : state) cpu()->log_softmax(x.mat);
}

/// What the next token is drawn from by default.
void largest(State& state, int64_t vocab) {
  Random random(5);
  const Rows x = Rows(1, vocab).fill(random);
  std::vector<Candidate> found(40);
  for (auto _ : state) cpu()->largest(x.mat, found);
}

/// `rows` queries at the end of `context` positions; 32 heads of 128 over 8 key/value heads.
void attend(State& state, int64_t rows, int64_t context, DType dtype) {
  Random random(6);
  const Rows q = Rows(rows, 32 * 128).fill(random), k = Rows(rows, 8 * 128).fill(random), out(rows, 32 * 128);
  const auto cache = cpu()->make_kv_cache({1, 8, 128, context, dtype});
  for (int64_t pos = 0; pos < context; pos += rows) {
    cpu()->attend(q.mat, k.mat, k.mat, *cache, 0, std::min(pos, context - rows), 0, out.mat);
  }
  for (auto _ : state) cpu()->attend(q.mat, k.mat, k.mat, *cache, 0, context - rows, 0, out.mat);
}

void barrier(State& state) {
  for (auto _ : state) cpu().pool.run([](int) {});
}

std::string name_of(const char* op, Shape s, DType dtype, Layout layout) {
  return std::string(op) + "/" + std::to_string(s.in) + "x" + std::to_string(s.out) + "/" +
         dtype_name(dtype) + (layout == Layout::rows ? "/rows" : "/channels");
}

template <class... Args>
void add(const std::string& name, void (*body)(State&, Args...), Args... args) {
  benchmark::RegisterBenchmark(name.c_str(), [=](State& state) { body(state, args...); })->UseRealTime();
}

void add_all() {
  add("barrier", barrier);
  for (const Shape s : kBenchShapes) {
    for (const DType dtype : kTypes) {
      for (const double keep : {1.0, 0.5, 0.25}) {
        const std::string name =
            name_of("gemv", s, dtype, Layout::channels) + "/keep:" + std::to_string(keep);
        add(name, gemv, s, dtype, Layout::channels, keep);
      }
    }
  }
  for (const Shape s : {Shape{2048, 128256 / 2}, Shape{4096, 4096}}) {
    for (const DType dtype : kTypes)
      add(name_of("gemv", s, dtype, Layout::rows), gemv, s, dtype, Layout::rows, 1.0);
  }
  for (const Shape s : {Shape{2048, 8192}, Shape{4096, 11008}}) {
    for (const DType dtype : kTypes) {
      for (const double keep : {1.0, 0.5, 0.25, 0.1})
        add(name_of("outputs", s, dtype, Layout::rows) + "/keep:" + std::to_string(keep), outputs, s, dtype,
            keep);
    }
  }
  for (const Products products : {Products::f32, Products::bf16}) {
    for (const Shape s : {Shape{768, 2048}, Shape{2048, 768}, Shape{768, 16384}}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        for (const Layout layout : kLayouts) {
          const std::string name = name_of("matmul", s, dtype, layout) + "/1024/";
          add(name + (products == Products::f32 ? "float32" : "bf16"), matmul, int64_t{1024}, s, dtype,
              layout, products);
        }
      }
    }
  }
  for (const int64_t rows : {1, 1024}) {
    for (const int64_t dim : {2048, 4096, 14336}) {
      const std::string shape = "/" + std::to_string(rows) + "x" + std::to_string(dim);
      add("topk" + shape, topk, rows, dim);
      add("norm" + shape, norm, rows, dim);
      add("glu" + shape, glu, rows, dim);
    }
  }
  add("softmax/1x128256", softmax, int64_t{1}, int64_t{128256});
  add("softmax/256x16384", softmax, int64_t{256}, int64_t{16384});
  for (const int64_t vocab : {32000, 151936}) add("largest/" + std::to_string(vocab), largest, vocab);
  for (const DType dtype : kKvTypes) {
    for (const int64_t rows : {1, 512}) {
      for (const int64_t context : {512, 4096}) {
        add("attend/" + std::to_string(rows) + "@" + std::to_string(context) + "/" + dtype_name(dtype),
            attend, rows, context, dtype);
      }
    }
  }
}

}  // namespace
}  // namespace larosa

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  std::fprintf(stderr, "%s, reads at %.1f GB/s\n", larosa::cpu()->describe().c_str(),
               larosa::read_bandwidth());
  larosa::add_all();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
