#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace larosa {
namespace {

/// Applies `advice` to the pages that hold [offset, offset + bytes). Advice only: a refusal changes nothing.
void advise(const std::byte* data, int64_t size, int64_t offset, int64_t bytes, int advice) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t first = std::clamp<int64_t>(offset, 0, size) / page * page;
  const int64_t last = std::clamp<int64_t>(offset + bytes, 0, size);
  if (last > first) madvise(const_cast<std::byte*>(data) + first, static_cast<size_t>(last - first), advice);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path, ": cannot open: ", std::strerror(errno));
  struct stat status {};
  if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(fd);
    fail(path, ": is not a regular file");
  }
  if (status.st_size > 0) {
    void* memory = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, fd, 0);
    const int reason = errno;
    close(fd);
    if (memory == MAP_FAILED) fail(path, ": cannot map: ", std::strerror(reason));
    data_ = static_cast<const std::byte*>(memory);
    size_ = status.st_size;
  } else {
    close(fd);
  }
}

MappedFile::MappedFile(MappedFile&& other) noexcept {
  *this = std::move(other);
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), static_cast<size_t>(size_));
}

void MappedFile::will_need(int64_t offset, int64_t bytes) const {
  advise(data_, size_, offset, bytes, MADV_WILLNEED);
}

void MappedFile::release(int64_t offset, int64_t bytes) const {
  advise(data_, size_, offset, bytes, MADV_DONTNEED);
}

}  // namespace larosa
