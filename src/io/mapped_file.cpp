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

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path, ": ", std::strerror(errno));
  struct stat status {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    fail(path, ": is not a regular file");
  }
  size_ = status.st_size;
  if (size_ > 0) {
    void* data = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (data == MAP_FAILED) fail(path, ": ", std::strerror(error));
    data_ = static_cast<const std::byte*>(data);
  } else {
    ::close(fd);
  }
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), static_cast<size_t>(size_));
}

namespace {
/// madvise over the pages of a byte range; only advice, so its result does not matter.
void advise(const std::byte* data, int64_t size, int64_t offset, int64_t bytes, int advice) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  if (!data || offset < 0 || bytes <= 0 || offset >= size) return;
  const int64_t begin = offset / page * page, end = std::min(size, offset + bytes);
  ::madvise(const_cast<std::byte*>(data) + begin, static_cast<size_t>(end - begin), advice);
}
}  // namespace

void MappedFile::will_need(int64_t offset, int64_t bytes) const {
  advise(data_, size_, offset, bytes, MADV_WILLNEED);
}
void MappedFile::release(int64_t offset, int64_t bytes) const {
  advise(data_, size_, offset, bytes, MADV_DONTNEED);
}

}  // namespace larosa
