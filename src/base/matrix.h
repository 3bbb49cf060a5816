// A float64 matrix in host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace larosa {

/// Row-major (rows, cols).
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), data(static_cast<size_t>(r * c)) {}
  bool empty() const { return data.empty(); }
  double* row(int64_t i) { return data.data() + i * cols; }
  const double* row(int64_t i) const { return data.data() + i * cols; }
};

}  // namespace larosa
