// What the operation tests and the benchmarks run on, once: shapes, keeps, types, instruction sets; and
// owners of rows and weights that are strided and misaligned on purpose.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numbers>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"
#include "base/quant.h"
#include "base/thread_pool.h"

namespace larosa::cases {

struct Shape {
  int64_t in, out;
};

/// Odd, one, below and above a vector, below and above a tile of oneDNN (384), more than one block of
/// accumulators.
inline const std::vector<Shape> kShapes = {{1, 1},     {3, 5},     {17, 64},    {64, 17},
                                           {257, 129}, {384, 768}, {1030, 403}, {48, 9001}};
/// Decoding shapes for benchmarks: a 1B model's projections, an 8B's, an odd one.
inline const std::vector<Shape> kBenchShapes = {
    {2048, 8192}, {8192, 2048}, {4096, 11008}, {2048, 2048}, {768, 2048}};
inline const std::vector<int64_t> kRows = {1, 2, 3, 17, 64};
inline const std::vector<DType> kTypes = {DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4};
inline const std::vector<Layout> kLayouts = {Layout::channels, Layout::rows};
inline const std::vector<int> kThreads = {1, 2, 3, 4};

inline std::vector<int64_t> keeps(int64_t n) {
  const std::set<int64_t> unique = {0, 1, n / 4, n / 2, n - 1, n};
  return {unique.begin(), unique.end()};
}

/// Every activation of a feed-forward, one of them with a threshold.
inline const std::vector<Activation> kActivations = {{Activation::silu, 0},
                                                     {Activation::relu, 0},
                                                     {Activation::relu, 0.3f},
                                                     {Activation::relu2, 0},
                                                     {Activation::drelu, 0}};

/// Attention: grouped heads, windows, prompts in pieces.
struct AttendCase {
  int64_t heads, kv_heads, width, window;
  std::vector<int64_t> steps;  // rows of each call, one after another
};
inline const std::vector<AttendCase> kAttendCases = {
    {1, 1, 2, 0, {1, 1, 1}},           {4, 2, 20, 0, {3, 1, 17, 1}},     {6, 2, 64, 0, {64, 1, 2, 17}},
    {2, 2, 33, 5, {7, 1, 30, 1}},      {4, 1, 16, 100, {300, 1, 70, 1}}, {2, 1, 64, 0, {1100, 1, 200, 1, 1}},
    {2, 1, 16, 300, {1500, 1, 3, 64}},
};

inline constexpr double kUnit = 0x1p-24;  // relative error of one float32 rounding

/// Bound of the error of a float32 sum of n products in any order, times Σ|x·w|; Higham, Accuracy and
/// Stability, §3.1.
inline double sum_bound(int64_t n) {
  const double nu = static_cast<double>(n + 3) * kUnit;
  return nu / (1 - nu);
}

/// Instruction sets to try: the one the environment forces, or all that this machine has, the best one first
/// (oneDNN settles on the first it meets). Ways to read memory, zen5 and intel, are no sets of their own: the
/// same bits from the same instructions (Gemv.ReadingChangesNoBit).
inline std::vector<std::string> isas() {
  static const std::string forced = std::getenv("LAROSA_ISA") ? std::getenv("LAROSA_ISA") : "";
  if (!forced.empty()) return {forced};
  std::vector<std::string> found;
  ThreadPool pool(1);
  for (const char* name : {"avx512vnni", "avx512", "avx2", "neon", "portable"}) {
    setenv("LAROSA_ISA", name, 1);
    try {
      make_cpu_backend({}, pool);
      found.push_back(name);
#if defined(__SANITIZE_THREAD__)
      break;  // threads share the work in the same way whatever the set
#endif
    } catch (const Error&) {  // this machine does not have it
    }
  }
  unsetenv("LAROSA_ISA");
  return found;
}

/// A cpu backend on one instruction set with threads of its own.
struct Cpu {
  Cpu(const std::string& isa, int threads, Products products = Products::f32) : pool(threads) {
    const char* before = std::getenv("LAROSA_ISA");
    const std::string kept = before ? before : "";
    setenv("LAROSA_ISA", isa.c_str(), 1);
    backend = make_cpu_backend({products}, pool);
    kept.empty() ? unsetenv("LAROSA_ISA") : setenv("LAROSA_ISA", kept.c_str(), 1);
  }
  Backend* operator->() const { return backend.get(); }

  ThreadPool pool;
  std::unique_ptr<Backend> backend;
};

/// SplitMix64 (Steele, Lea, Flood, 2014).
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed) {}
  /// About normal, mean 0 and variance 1: the sum of four uniform numbers, without logarithms (which took
  /// half of gemv_test's time under the sanitizers).
  float normal() {
    const uint64_t bits = next();
    int64_t sum = -2 * 0xffff;
    for (int quarter = 0; quarter < 4; ++quarter) sum += static_cast<int64_t>(bits >> 16 * quarter & 0xffff);
    return static_cast<float>(sum) * (std::numbers::sqrt3_v<float> / 65536);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t state_;
};

/// Memory before a page that may not be touched: a kernel that reads or writes past the end crashes, whatever
/// the instruction set. Never on a vector's boundary: what would begin there ends `off` elements before the
/// page.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t off = 1) : count_(static_cast<size_t>(count)) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    spare_ = count_ * sizeof(T) % 64 == 0 ? static_cast<size_t>(off) : 0;
    const size_t bytes = (count_ + spare_) * sizeof(T);
    const size_t pages = (bytes + page - 1) / page * page;
    mapped_ = pages + page;
    map_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(map_ != MAP_FAILED && mprotect(map_ + pages, page, PROT_NONE) == 0);
    data_ = reinterpret_cast<T*>(map_ + pages - bytes);
  }
  Guarded(Guarded&& other) noexcept
      : map_(std::exchange(other.map_, nullptr)),
        mapped_(other.mapped_),
        count_(other.count_),
        spare_(other.spare_),
        data_(other.data_) {}
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (map_) munmap(map_, mapped_);
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  /// Elements between the last one and the page.
  size_t spare() const { return spare_; }

 private:
  std::byte* map_;
  size_t mapped_, count_, spare_;
  T* data_;
};

/// Rows that own their memory, off any alignment, with a gap of NaN after each row, the last one's as far as
/// the page.
class Rows {
 public:
  Rows(int64_t rows, int64_t cols, int64_t gap = 3)
      : data_(rows > 0 ? rows * (cols + gap) - gap : 0), mat(data_.data(), rows, cols, cols + gap) {
    std::fill_n(data_.data(), data_.size() + data_.spare(), std::numeric_limits<float>::quiet_NaN());
  }
  Rows(const Rows& other) : Rows(other.mat.rows, other.mat.cols, other.mat.stride - other.mat.cols) {
    std::copy_n(other.data_.data(), data_.size(), data_.data());
  }
  Rows& operator=(const Rows&) = delete;

  Rows& fill(Random& random, float scale = 1) {
    for (int64_t t = 0; t < mat.rows; ++t) {
      for (int64_t i = 0; i < mat.cols; ++i) mat.row(t)[i] = scale * random.normal();
    }
    return *this;
  }
  float at(int64_t t, int64_t i) const { return mat.row(t)[i]; }
  /// The gaps are still NaN: nothing wrote between the rows or behind them.
  bool gaps_intact() const {
    const float* behind = data_.data() + data_.size();
    if (!std::all_of(behind, behind + data_.spare(), [](float v) { return std::isnan(v); })) return false;
    for (int64_t t = 0; t + 1 < mat.rows; ++t) {
      for (int64_t i = mat.cols; i < mat.stride; ++i) {
        if (!std::isnan(mat.row(t)[i])) return false;
      }
    }
    return true;
  }

 private:
  Guarded<float> data_;

 public:
  Mat mat;
};

/// A weight that owns its memory, off any alignment but its elements'.
class StoredWeight {
 public:
  StoredWeight(DType dtype, Layout layout, int64_t in, int64_t out, bool bias, Random& random)
      : weight{nullptr, nullptr, dtype, layout, in, out},
        bytes_(weight.bytes(), quantised(dtype) ? 1 : dtype_size(dtype)),
        bias_(bias ? out : 0) {
    const int64_t line = weight.line_bytes();
    std::vector<float> values(static_cast<size_t>(weight.line_length()));
    for (int64_t i = 0; i < weight.lines(); ++i) {
      for (float& v : values) v = 0.5f * random.normal();
      std::byte* to = bytes_.data() + i * line;
      if (quantised(dtype)) {
        quantise_line(values.data(), weight.line_length(), dtype, to);
        continue;
      }
      for (size_t j = 0; j < values.size(); ++j) store_element(to, dtype, static_cast<int64_t>(j), values[j]);
    }
    for (size_t i = 0; i < bias_.size(); ++i) bias_.data()[i] = random.normal();
    weight.data = bytes_.data();
    weight.bias = bias ? bias_.data() : nullptr;
  }
  StoredWeight(StoredWeight&&) = default;
  StoredWeight(const StoredWeight&) = delete;

  Weight weight;

 private:
  Guarded<std::byte> bytes_;
  Guarded<float> bias_;
};

/// Fills the room that quantised lines have behind their last value: what stands there must not count.
inline void fill_padding(const Weight& w) {
  if (!quantised(w.dtype)) return;
  for (int64_t line = 0; line < w.lines(); ++line) {
    auto* const bytes = static_cast<std::byte*>(const_cast<void*>(w.line(line)));
    for (int64_t i = w.line_length(); i < padded_line(w.line_length()); ++i)
      round_value(1e30f, i, w.line_length(), w.dtype, bytes);
    constexpr uint16_t kNan = 0x7e00;
    const int64_t group = quant_group(w.dtype);
    for (int64_t g = (w.line_length() + group - 1) / group; g < padded_line(w.line_length()) / group; ++g)
      std::memcpy(bytes + scales_offset(w.dtype, w.line_length()) + 2 * g, &kNan, 2);
  }
}

/// Number of entries whose bits differ.
inline int64_t bits_differ(Mat a, Mat b) {
  int64_t count = 0;
  for (int64_t t = 0; t < a.rows; ++t) {
    for (int64_t i = 0; i < a.cols; ++i) {
      count += std::bit_cast<uint32_t>(a.row(t)[i]) != std::bit_cast<uint32_t>(b.row(t)[i]);
    }
  }
  return count;
}

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kTiny = std::numeric_limits<float>::denorm_min();

/// Random, ties, equal, zeros, special values, wide range, random with four of each, a quarter of the row
/// apart.
inline Rows hard_rows(int64_t n, Random& random) {
  Rows rows(7, n);
  const float special[] = {0.0f,  -0.0f, kTiny, -kTiny, 3 * kTiny, kInf,
                           -kInf, kNan,  -kNan, 1.0f,   -1.0f,     1e30f};
  for (int64_t i = 0; i < n; ++i) {
    rows.mat.row(0)[i] = random.normal();
    rows.mat.row(1)[i] = static_cast<float>(random.below(5)) - 2;
    rows.mat.row(2)[i] = -2.5f;
    rows.mat.row(3)[i] = i % 2 ? 0.0f : -0.0f;
    rows.mat.row(4)[i] = special[random.below(std::size(special))];
    rows.mat.row(5)[i] = random.normal() * std::exp(20 * random.normal());
    const int64_t quarter = (n + 3) / 4;
    rows.mat.row(6)[i] = i < quarter ? random.normal() : rows.at(6, i - quarter);
  }
  return rows;
}

}  // namespace larosa::cases
