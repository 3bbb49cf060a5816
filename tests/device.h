// Operands in a backend's own memory, for tests of backends that have one.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "backend/devices.h"
#include "products.h"

namespace larosa::cases {

/// A CUDA backend, or nothing where no device is.
inline std::unique_ptr<Backend> find_cuda(Products products = Products::f32) {
  std::string reason;
  if (cuda_devices(reason).empty()) return nullptr;
  return make_cuda_backend({0, products});
}

/// A copy of some rows in backend memory, with the host's gaps.
class DeviceRows {
 public:
  DeviceRows(Backend& backend, const Rows& host)
      : backend_(backend), host_(host), data_(backend.allocate((host.mat.rows * host.mat.stride + 1) * 4)) {
    const Mat& m = host.mat;
    float* first = static_cast<float*>(data_.get()) + 1;  // off any alignment, as on the host
    mat = Mat(first, m.rows, m.cols, m.stride);
    // With the gaps, which must stay as they are.
    backend.write(m.data, Mat(first, 1, extent()));
  }
  /// The rows as they are now.
  Rows back() const {
    Rows rows(host_);
    backend_.read(Mat(mat.data, 1, extent()), rows.mat.data);
    return rows;
  }

 private:
  /// As far as the last row's end.
  int64_t extent() const { return mat.rows > 0 ? (mat.rows - 1) * mat.stride + mat.cols : 0; }

  Backend& backend_;
  const Rows host_;
  std::shared_ptr<void> data_;

 public:
  Mat mat;
};

/// Floats in backend memory.
class DeviceFloats {
 public:
  DeviceFloats(Backend& backend, const std::vector<float>& host)
      : data_(backend.upload(host.data(), static_cast<int64_t>(host.size()) * 4)) {}
  const float* get() const { return static_cast<const float*>(data_.get()); }

 private:
  std::shared_ptr<const void> data_;
};

/// A weight in backend memory, as aligned as memory comes, or one element off.
class DeviceWeight {
 public:
  DeviceWeight(Backend& backend, const Weight& host, bool aligned) : weight(host) {
    const int64_t gap = aligned ? 0 : dtype_size(host.dtype), bytes = host.bytes();
    std::vector<char> copy(static_cast<size_t>(bytes + gap));
    std::memcpy(copy.data() + gap, host.data, static_cast<size_t>(bytes));
    data_ = backend.upload(copy.data(), bytes + gap);
    weight.data = static_cast<const char*>(data_.get()) + gap;
    if (!host.bias) return;
    bias_ = backend.upload(host.bias, host.out * 4);
    weight.bias = static_cast<const float*>(bias_.get());
  }

 private:
  std::shared_ptr<const void> data_, bias_;

 public:
  Weight weight;
};

/// A product case with its operands in backend memory.
class DeviceCase {
 public:
  DeviceCase(Backend& backend, const ProductCase& host, bool aligned)
      : x(backend, host.x), backend_(backend), host_(host) {
    for (const StoredWeight& w : host.weights) weights_.emplace_back(backend, w.weight, aligned);
  }
  std::vector<Rows> run(Mat rows) {
    return collect([&](auto products) { backend_.matmul(rows, products); });
  }
  const Weight& weight(size_t p) const { return weights_[p].weight; }
  std::vector<Rows> run() { return run(x.mat); }
  std::vector<Rows> run_sparse(const Selection& kept) {
    return collect([&](auto products) { backend_.sparse_matmul(kept, products); });
  }

  DeviceRows x;

 private:
  template <class Body>
  std::vector<Rows> collect(const Body& body) {
    const std::vector<Rows> start = host_.results();
    std::vector<std::unique_ptr<DeviceRows>> y;
    std::vector<Product> products = host_.products(start);
    for (size_t p = 0; p < start.size(); ++p) {
      y.push_back(std::make_unique<DeviceRows>(backend_, start[p]));
      products[p].y = y[p]->mat;
      products[p].weight = weights_[p].weight;
    }
    body(std::span<const Product>(products));
    std::vector<Rows> found;
    for (const auto& rows : y) found.push_back(rows->back());
    return found;
  }

  Backend& backend_;
  const ProductCase& host_;
  std::vector<DeviceWeight> weights_;
};

}  // namespace larosa::cases
