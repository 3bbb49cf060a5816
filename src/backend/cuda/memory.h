// Device memory, and the host's that the device writes to: plain allocations.
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

/// Memory of the host that kernels write to: what is there once they have been waited for needs no copy.
class HostMemory {
 public:
  explicit HostMemory(int64_t bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  template <class T>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// cudaMalloc; throws Error with what was asked for and what is free.
void* allocate_device(int64_t bytes);

/// GB/s of copies within the device, bytes read and written; median of seven.
double copy_bandwidth(cudaStream_t stream, int64_t bytes);

}  // namespace larosa::cuda
