// Device memory: plain allocations.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace larosa::cuda {

/// Memory that grows when asked to and is freed at the end. What it held is lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /// Throws Error with the numbers when the device has no room.
  void* at_least(int64_t bytes);
  template <class T>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

/// cudaMalloc; throws Error with what was asked for and what is free.
void* allocate_device(int64_t bytes);

/// GB/s of copies within the device, bytes read and written; median of seven.
double copy_bandwidth(cudaStream_t stream, int64_t bytes);

}  // namespace larosa::cuda
