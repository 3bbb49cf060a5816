// The writing half of io/safetensors.h.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/safetensors.h"

namespace larosa {

struct SafetensorsWriter::Data {
  std::string path;
  int fd = -1;
  bool finished = false;
  int64_t start = 0;
  std::map<std::string, std::pair<int64_t, int64_t>> ranges;  // name → offset in the data section, bytes

  void write_at(int64_t offset, const void* bytes, int64_t count);
};

void SafetensorsWriter::Data::write_at(int64_t offset, const void* bytes, int64_t count) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t done = ::pwrite(fd, from, static_cast<size_t>(count), offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) fail(path, ": cannot be written: ", std::strerror(done < 0 ? errno : ENOSPC));
    from += done;
    offset += done;
    count -= done;
  }
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : data_(std::make_unique<Data>()) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t next = 0;
  for (const Entry& entry : entries) {
    int64_t bytes = dtype_size(entry.dtype);
    for (int64_t n : entry.shape) bytes = checked_mul(bytes, n, path + ": tensor " + entry.name);
    constexpr const char* kNames[] = {"F32", "F16", "BF16", "F64"};
    header[entry.name] = {{"dtype", kNames[static_cast<int>(entry.dtype)]},
                          {"shape", entry.shape},
                          {"data_offsets", {next, next + bytes}}};
    CHECK(data_->ranges.emplace(entry.name, std::pair(next, bytes)).second);
    next = checked_add(next, bytes, path);
  }
  std::string text = header.empty() ? "{}" : header.dump();
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');  // data starts on a cache line
  data_->path = path;
  data_->start = 8 + static_cast<int64_t>(text.size());
  data_->fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (data_->fd < 0) fail(path, ": cannot be created: ", std::strerror(errno));
  const uint64_t length = text.size();
  data_->write_at(0, &length, 8);
  data_->write_at(8, text.data(), static_cast<int64_t>(text.size()));
  if (next > 0 && ::ftruncate(data_->fd, data_->start + next) != 0)
    fail(path, ": cannot be written: ", std::strerror(errno));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (data_->fd >= 0) ::close(data_->fd);
  if (!data_->finished) ::unlink(data_->path.c_str());
}

void SafetensorsWriter::write(const std::string& name, int64_t offset, const void* data, int64_t bytes) {
  const auto it = data_->ranges.find(name);
  CHECK(it != data_->ranges.end() && offset >= 0 && bytes >= 0 && offset + bytes <= it->second.second);
  data_->write_at(data_->start + it->second.first + offset, data, bytes);
}

void SafetensorsWriter::finish() {
  const int fd = std::exchange(data_->fd, -1);
  const bool synced = ::fsync(fd) == 0;
  const int error = errno;
  if (::close(fd) != 0 || !synced) fail(data_->path, ": cannot be written: ", std::strerror(error));
  data_->finished = true;
}

}  // namespace larosa
