#include "calib/gptq.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/algebra.h"
#include "base/error.h"
#include "base/progress.h"
#include "base/quant.h"
#include "base/thread_pool.h"

namespace larosa {
namespace {

constexpr int64_t kBlock = 128;  // channels between two updates of all that follow
constexpr int64_t kTile = 512;   // outputs of a task: whole blocks of a line, a fixed cut

/// Rows and columns of the symmetric matrix in the given order, in place by transpositions: a second copy of
/// the widest site's moments would not fit.
void reorder(Matrix& m, std::span<const int64_t> order) {
  const int64_t n = m.rows;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) m.row(i)[j] = m.row(j)[i];
  std::vector<int64_t> at(static_cast<size_t>(n)), place(at.size());  // channel at a row, row of a channel
  std::iota(at.begin(), at.end(), int64_t{0});
  std::iota(place.begin(), place.end(), int64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = place[static_cast<size_t>(order[static_cast<size_t>(i)])];
    if (i == j) continue;
    std::swap_ranges(m.row(i), m.row(i) + n, m.row(j));
    for (int64_t r = 0; r < n; ++r) std::swap(m.row(r)[i], m.row(r)[j]);
    std::swap(at[static_cast<size_t>(i)], at[static_cast<size_t>(j)]);
    place[static_cast<size_t>(at[static_cast<size_t>(i)])] = i;
    place[static_cast<size_t>(at[static_cast<size_t>(j)])] = j;
  }
}

/// One task: the outputs [first, first + width) of all channels.
class Tile {
 public:
  Tile(const Weight& weight, DType dtype, const RoundingFactor& factor, int64_t first, FoldedTensor& to)
      : dtype_(dtype),
        by_channels_(weight.layout == Layout::channels),
        factor_(factor),
        first_(first),
        out_(weight.out),
        n_(weight.in),
        width_(std::min(kTile, weight.out - first)),
        values_(static_cast<size_t>(n_ * width_)),
        errors_(static_cast<size_t>(kBlock * width_)),
        stored_(static_cast<size_t>(width_)),
        to_(to) {
    for (int64_t i = 0; i < n_; ++i) {
      float* row = values_.data() + i * width_;
      if (by_channels_) {
        read_line(weight.line(channel(i)), weight.dtype, out_, first_, width_, row);
      } else {
        for (int64_t j = 0; j < width_; ++j)
          row[j] = load_element(weight.line(first_ + j), weight.dtype, channel(i));
      }
      for (int64_t j = 0; j < width_; ++j)
        if (!std::isfinite(row[j]))
          fail("tensor ", to.name, ": holds ", row[j], ", which cannot be quantised");
    }
    if (!by_channels_) choose_scales(weight);
  }

  void run() {
    for (int64_t end = n_; end > 0; end = std::max<int64_t>(0, end - kBlock)) {
      const int64_t begin = std::max<int64_t>(0, end - kBlock);
      for (int64_t i = end - 1; i >= begin; --i) round_channel(i, begin);
      if (begin == 0) continue;
      cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, static_cast<int>(begin), static_cast<int>(width_),
                  static_cast<int>(end - begin), -1.0f, row_of_factor(begin), static_cast<int>(n_),
                  errors_.data(), static_cast<int>(width_), 1.0f, values_.data(), static_cast<int>(width_));
    }
  }

 private:
  int64_t channel(int64_t i) const { return factor_.order[static_cast<size_t>(i)]; }
  std::byte* line(int64_t i) { return to_.bytes.data() + i * line_bytes(dtype_, by_channels_ ? out_ : n_); }

  /// Of rows: the nearest rounding, whose levels are replaced one by one.
  void choose_scales(const Weight& weight) {
    std::vector<float> row(static_cast<size_t>(n_));
    for (int64_t j = first_; j < first_ + width_; ++j) {
      read_line(weight.line(j), weight.dtype, n_, 0, n_, row.data());
      quantise_line(row.data(), n_, dtype_, line(j));
    }
  }

  const float* row_of_factor(int64_t i) const { return factor_.factor.data() + i * n_; }

  /// Quantises channel i and moves its error to the channels [begin, i) of its block.
  void round_channel(int64_t i, int64_t begin) {
    float* row = values_.data() + i * width_;
    float* error = errors_.data() + (i - begin) * width_;
    if (by_channels_) {
      quantise_part(row, first_, width_, out_, dtype_, line(channel(i)));
      read_line(line(channel(i)), dtype_, out_, first_, width_, stored_.data());
    } else {
      for (int64_t j = 0; j < width_; ++j)
        stored_[static_cast<size_t>(j)] = round_value(row[j], channel(i), n_, dtype_, line(first_ + j));
    }
    const float* share = row_of_factor(i);
    for (int64_t j = 0; j < width_; ++j) error[j] = (row[j] - stored_[static_cast<size_t>(j)]) / share[i];
    for (int64_t k = begin; k < i; ++k) {
      float* other = values_.data() + k * width_;
      for (int64_t j = 0; j < width_; ++j) other[j] -= share[k] * error[j];
    }
  }

  const DType dtype_;
  const bool by_channels_;
  const RoundingFactor& factor_;
  const int64_t first_, out_, n_, width_;
  std::vector<float> values_;  // (D, width) channels in order
  std::vector<float> errors_;  // (kBlock, width)
  std::vector<float> stored_;
  FoldedTensor& to_;
};

}  // namespace

RoundingFactor rounding_factor(Matrix&& moments, double damping, Algebra& algebra) {
  Matrix m = std::move(moments);
  const int64_t n = m.rows;
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += m.row(i)[i] / static_cast<double>(n);
  if (!std::isfinite(mean)) fail("rounding: the calibration's activations are not finite");
  // Without any input every rounding is as good: the nearest one.
  const double added = mean > 0 ? damping * mean : 1;
  for (int64_t i = 0; i < n; ++i) m.row(i)[i] += added;
  RoundingFactor result;
  result.order.resize(static_cast<size_t>(n));
  std::iota(result.order.begin(), result.order.end(), int64_t{0});
  std::stable_sort(result.order.begin(), result.order.end(),
                   [&](int64_t a, int64_t b) { return m.row(a)[a] < m.row(b)[b]; });
  reorder(m, result.order);
  algebra.invert_factor(m);
  result.factor.resize(m.data.size());
  std::transform(m.data.begin(), m.data.end(), result.factor.begin(),
                 [](double v) { return static_cast<float>(v); });
  return result;
}

FoldedTensor round_by_moments(const std::string& name, const Weight& weight, DType dtype,
                              const RoundingFactor& factor, ThreadPool& pool) {
  CHECK(quantised(dtype) && (weight.layout == Layout::channels || !quantised(weight.dtype)));
  CHECK(int64_t(factor.order.size()) == weight.in);
  const int64_t lines = weight.lines(), length = weight.line_length();
  const SafetensorsWriter::Entry entry = stored_entry(name, dtype, lines, length);
  FoldedTensor tensor{name, entry.dtype, entry.shape, {}};
  tensor.bytes.resize(static_cast<size_t>(lines * line_bytes(dtype, length)));  // zeros: padding
  openblas_set_num_threads(1);
  pool.each((weight.out + kTile - 1) / kTile, [&](int64_t tile) {
    throw_if_interrupted();
    Tile(weight, dtype, factor, tile * kTile, tensor).run();
  });
  return tensor;
}

}  // namespace larosa
