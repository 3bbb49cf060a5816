// A backend that times every operation of another one: where a token's time goes, and how fast its bytes
// come. Results are the other one's, bit for bit.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"

namespace larosa {

/// All calls of one name together.
struct Timing {
  std::string name;  // the operation and what it reads: "matmul head", "topk h1", "rope"
  int64_t calls = 0;
  int64_t bytes = 0;  // read from memory: tensors, the key/value cache. Activations stay in the caches.
  double seconds = 0;
};

class Profile {
 public:
  /// Operations that read the tensor at `data` carry `word` in their names (null: ignored).
  void name(const void* data, const std::string& word) {
    if (data) words_[data] = word;
  }
  /// "operation word word …" of the tensors, or "operation".
  std::string name_of(const char* operation, std::span<const void* const> tensors) const;

  void add(const std::string& name, int64_t bytes, std::chrono::steady_clock::duration time);

  /// What was added since the last call, in the order of the first calls.
  std::vector<Timing> take();

 private:
  std::unordered_map<const void*, std::string> words_;
  std::vector<Timing> timings_;
};

/// Forwards every operation to `inner` and adds it to `profile`; both must outlive it. Its selections and
/// caches are `inner`'s; attend takes caches that were made here. Bytes: every tensor once per call; of a
/// sparse product over one row the kept channels only; of the cache the positions attended to. Times are
/// from the call until `inner` has finished.
std::unique_ptr<Backend> make_profiled_backend(Backend& inner, Profile& profile);

}  // namespace larosa
