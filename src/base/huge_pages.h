// Memory for what is read at the speed of the memory itself: weights made here, the bandwidth's buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace larosa {

/// Anonymous memory, on 2 MiB pages where the kernel gives them to who asks (transparent_hugepage/enabled is
/// madvise or always) and on its usual pages otherwise: a walk through gigabytes then misses the
/// translation buffer 512 times less often. Fresh, so that the thread that first writes a page decides where
/// it lies.
class HugePages {
 public:
  static constexpr int64_t kPage = int64_t{1} << 21;

  /// At least `bytes`, aligned to kPage if there are that many and to a usual page otherwise. Throws
  /// std::bad_alloc.
  explicit HugePages(int64_t bytes);

  std::byte* data() const { return data_.get(); }

 private:
  struct Unmap {
    size_t bytes;
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte[], Unmap> data_;
};

}  // namespace larosa
