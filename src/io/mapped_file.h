// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace larosa {

class MappedFile {
 public:
  MappedFile() = default;
  /// Maps the whole file. Throws Error (path, reason) when it cannot be opened or is no regular file.
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::byte* data() const { return data_; }
  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

  /// Tells the system that these bytes will be read soon, in order.
  void will_need(int64_t offset, int64_t bytes) const;
  /// Gives the pages of these bytes back (they are read again from the file when touched): keeps the resident
  /// size small while a model is streamed.
  void release(int64_t offset, int64_t bytes) const;

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace larosa
