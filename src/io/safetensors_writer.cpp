#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/safetensors.h"

namespace larosa {
namespace {

const char* stored_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "F32";
    case DType::f16:
      return "F16";
    case DType::bf16:
      return "BF16";
    case DType::f64:
      return "F64";
    default:
      return "U8";  // quantised lines
  }
}

}  // namespace

struct SafetensorsWriter::Data {
  struct Place {
    int64_t offset, bytes;  // offset in the file
  };
  std::string path;
  int fd = -1;
  std::map<std::string, Place> places;
  int64_t expected = 0, written = 0;  // bytes of tensor data

  ~Data() {
    if (fd < 0) return;
    struct stat status {};
    const bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);  // never removes a device
    close(fd);
    if (regular) unlink(path.c_str());
  }

  [[noreturn]] void fail_write() const { fail(path, ": cannot write: ", std::strerror(errno)); }

  void write_at(int64_t offset, const void* data, int64_t bytes) const {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t done = pwrite(fd, from, static_cast<size_t>(bytes), offset);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) fail_write();
      from += done;
      offset += done;
      bytes -= done;
    }
  }
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, const std::vector<Entry>& entries,
                                     const std::map<std::string, std::string>& metadata)
    : data_(std::make_unique<Data>()) {
  constexpr size_t kAlign = 64;  // of the first tensor: a cache line
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t end = 0;
  for (const Entry& entry : entries) {
    int64_t bytes = dtype_size(entry.dtype);
    for (const int64_t d : entry.shape) bytes = checked_mul(bytes, d, path + ": tensor " + entry.name);
    const int64_t begin = end;
    end = checked_add(begin, bytes, path + ": tensor " + entry.name);
    header[entry.name] = {
        {"dtype", stored_name(entry.dtype)}, {"shape", entry.shape}, {"data_offsets", {begin, end}}};
    CHECK(data_->places.emplace(entry.name, Data::Place{begin, bytes}).second);
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.resize((sizeof(uint64_t) + text.size() + kAlign - 1) / kAlign * kAlign - sizeof(uint64_t), ' ');
  const uint64_t length = text.size();
  for (auto& [name, place] : data_->places) place.offset += static_cast<int64_t>(sizeof(length) + length);

  data_->path = path;
  data_->expected = end;
  data_->fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (data_->fd < 0) fail(path, ": cannot create: ", std::strerror(errno));
  data_->write_at(0, &length, sizeof(length));
  data_->write_at(sizeof(length), text.data(), static_cast<int64_t>(length));
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, int64_t offset, const void* data, int64_t bytes) {
  const auto place = data_->places.find(name);
  CHECK(place != data_->places.end());
  CHECK(offset >= 0 && bytes >= 0 && offset <= place->second.bytes - bytes);
  data_->write_at(place->second.offset + offset, data, bytes);
  data_->written += bytes;
}

void SafetensorsWriter::finish() {
  CHECK(data_->fd >= 0 && data_->written == data_->expected);
  if (fsync(data_->fd) != 0) data_->fail_write();
  const int fd = data_->fd;
  data_->fd = -1;
  if (close(fd) != 0) {
    const int reason = errno;
    unlink(data_->path.c_str());
    fail(data_->path, ": cannot write: ", std::strerror(reason));
  }
}

}  // namespace larosa
