// safetensors files: one, many with an index, and a writer. Every number in a header is checked before it is
// used; nothing a file says can make us read outside of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/types.h"
#include "io/mapped_file.h"

namespace larosa {

/// One stored tensor. `data` points into the mapped file and is aligned only as the file aligns it.
struct Tensor {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  int64_t bytes = 0;

  int64_t elements() const { return bytes / dtype_size(dtype); }
};

/// "(4096, 11008)" for messages.
std::string shape_text(std::span<const int64_t> shape);

/// A model's tensors: `dir`/model.safetensors, or the shards that `dir`/model.safetensors.index.json names.
class Checkpoint {
 public:
  /// Opens and validates all headers. Throws Error naming file and field for: absent, truncated or over-long
  /// file, header length beyond the file or 100 MB, malformed JSON, unknown or unsupported dtype of a tensor
  /// that is asked for, shape products that overflow, offsets that overlap, leave gaps or run past the end, a
  /// tensor in two shards, an index that names a path outside the directory or an absent shard or tensor.
  static Checkpoint open(const std::string& dir);
  /// A single file.
  static Checkpoint open_file(const std::string& path);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  /// The tensor, or nothing.
  std::optional<Tensor> find(const std::string& name) const;
  /// The tensor if it is there as plain bytes (U8, how quantised lines are stored), else nothing.
  std::optional<Tensor> find_bytes(const std::string& name) const;
  /// The tensor; throws Error (file, tensor, expected, found) when it is absent or has another shape.
  Tensor get(const std::string& name, std::span<const int64_t> shape) const;
  /// All names, sorted.
  std::vector<std::string> names() const;
  /// The string metadata of all files together (`__metadata__`).
  const std::map<std::string, std::string>& metadata() const;
  /// Path of the file that holds a tensor (for messages); `dir` where absent.
  std::string file_of(const std::string& name) const;
  /// Sum of all tensors' bytes.
  int64_t bytes() const;

  /// Gives the pages of tensor.data … + tensor.bytes back to the system; nothing for memory of no file here.
  void release(const Tensor& tensor) const;
  /// Throws Error naming the first tensor with a NaN or an infinity (`--check-tensors`).
  void check_finite() const;
  /// 16 hex digits that name this model: names, types and shapes of all tensors and a sample of each one's
  /// bytes (its first and last 4 KiB and 64 places between), XXH3.
  std::string fingerprint() const;

 private:
  struct Data;
  explicit Checkpoint(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

/// Writes one safetensors file. All tensors are declared first, then written in any order; `finish` makes the
/// file complete. Without `finish` the destructor removes what was written.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  /// Writes the header to `path` (which is created or truncated). Throws Error with the system's reason.
  SafetensorsWriter(const std::string& path, const std::vector<Entry>& entries,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Writes `bytes` at byte `offset` of the tensor. Throws Error (for instance "No space left on device").
  void write(const std::string& name, int64_t offset, const void* data, int64_t bytes);
  /// Flushes to disk and closes. Throws Error when the system could not store it.
  void finish();

 private:
  struct Data;
  std::unique_ptr<Data> data_;
};

}  // namespace larosa
