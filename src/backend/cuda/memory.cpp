#include "backend/cuda/memory.h"

#include <algorithm>
#include <vector>

#include "backend/cuda/kernels.h"
#include "base/error.h"

namespace larosa::cuda {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail("cuda: ", what, ": ", cudaGetErrorString(error));
}

Stream make_stream(int device) {
  Stream s;
  s.device = device;
  check(cudaSetDevice(device), "device");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "device");
  if (properties.major < 8) {
    fail("cuda:", device, ": ", properties.name, " has compute capability ", properties.major, ".",
         properties.minor, ", expected 8.0 or more");
  }
  s.multiprocessors = properties.multiProcessorCount;
  if (s.multiprocessors < kGroup)
    fail("cuda:", device, ": ", s.multiprocessors, " multiprocessors, expected ", kGroup, " or more");
  s.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin) - kStaticShared;
  s.dependent = properties.major >= 9 && launches_may_depend();
  check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), "stream");
  return s;
}

void* allocate_device(int64_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1))) == cudaSuccess) return data;
  cudaGetLastError();
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "memory");
  fail("cuda: ", bytes, " bytes do not fit: ", free, " of ", total, " are free");
}

Buffer::~Buffer() {
  cudaFree(data_);
}

void* Buffer::at_least(int64_t bytes) {
  if (bytes > size_) {
    cudaFree(data_);
    data_ = nullptr;
    size_ = 0;
    data_ = allocate_device(bytes);
    size_ = bytes;
  }
  return data_;
}

HostMemory::HostMemory(int64_t bytes) {
  check(cudaHostAlloc(&data_, static_cast<size_t>(bytes), cudaHostAllocMapped), "host memory");
}

HostMemory::~HostMemory() {
  cudaFreeHost(data_);
}

double copy_bandwidth(cudaStream_t stream, int64_t bytes) {
  constexpr int kTimes = 7;
  bytes = std::max(bytes, int64_t{1} << 30);  // an H200 copies 512 MiB at 3.96 TB/s, 1 GiB at 4.23
  Buffer from, to;
  from.at_least(bytes);
  to.at_least(bytes);
  check(cudaMemsetAsync(from.get<void>(), 0x5a, static_cast<size_t>(bytes), stream), "memory");
  cudaEvent_t start{}, stop{};
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<double> rates;
  for (int i = 0; i <= kTimes; ++i) {
    check(cudaEventRecord(start, stream), "event");
    check(cudaMemcpyAsync(to.get<void>(), from.get<void>(), static_cast<size_t>(bytes),
                          cudaMemcpyDeviceToDevice, stream),
          "copy");
    check(cudaEventRecord(stop, stream), "event");
    check(cudaEventSynchronize(stop), "event");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "event");
    if (i > 0) rates.push_back(2e-6 * static_cast<double>(bytes) / static_cast<double>(ms));
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(rates.begin(), rates.end());
  return rates[kTimes / 2];
}

}  // namespace larosa::cuda
