// What whole-model tests share: the repository's models, temporary directories, logits of a token sequence.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "model/decoder.h"
#include "model/model.h"

namespace larosa {

inline std::string source_path(const std::string& path) {
  return std::string(LAROSA_SOURCE_DIR) + "/" + path;
}
inline std::string demo_model() {
  return source_path("models/demo-7m");
}

/// The tiny random models of tests/golden/models, one per family; of tests/golden/sparse, one per way of
/// being trained sparse.
inline std::vector<std::string> tiny_models(const std::string& folder = "models") {
  std::vector<std::string> dirs;
  for (const auto& entry : std::filesystem::directory_iterator(source_path("tests/golden/" + folder))) {
    if (std::filesystem::exists(entry.path() / "config.json")) dirs.push_back(entry.path().string());
  }
  std::sort(dirs.begin(), dirs.end());
  return dirs;
}

/// A directory that is removed at the end.
class TemporaryDir {
 public:
  TemporaryDir() {
    std::string name = (std::filesystem::temp_directory_path() / "larosa-test-XXXXXX").string();
    if (!mkdtemp(name.data())) std::abort();
    path_ = name;
  }
  ~TemporaryDir() { std::filesystem::remove_all(path_); }
  TemporaryDir(const TemporaryDir&) = delete;
  TemporaryDir& operator=(const TemporaryDir&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// Reproducible token ids in [0, vocab).
inline std::vector<int32_t> some_tokens(int64_t vocab, size_t count, uint64_t seed = 1) {
  std::vector<int32_t> tokens(count);
  for (int32_t& t : tokens) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    t = static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

/// Logits of every position. // (tokens, vocab), `chunk` tokens at a time (1: token by token)
inline std::vector<float> all_logits(const Model& model, Backend& backend, const std::vector<int32_t>& tokens,
                                     size_t chunk, bool dense = false) {
  const ModelConfig& c = model.config;
  Decoder decoder(c, backend);
  const auto cache = backend.make_kv_cache(
      {c.layers, c.kv_heads, c.head_dim, static_cast<int64_t>(tokens.size()), DType::f32});
  const auto size = static_cast<int64_t>(chunk);
  const auto hidden = backend.allocate(size * c.dim * 4), rows = backend.allocate(size * c.vocab * 4);
  std::vector<float> logits(tokens.size() * static_cast<size_t>(c.vocab));
  for (size_t first = 0; first < tokens.size(); first += chunk) {
    const size_t count = std::min(chunk, tokens.size() - first);
    const Mat h(static_cast<float*>(hidden.get()), static_cast<int64_t>(count), c.dim);
    const Mat found(static_cast<float*>(rows.get()), h.rows, c.vocab);
    decoder.forward(model, std::span(tokens).subspan(first, count), *cache, static_cast<int64_t>(first),
                    Pass{dense, nullptr}, h);
    decoder.logits(model, h, found);
    backend.read(found, logits.data() + first * static_cast<size_t>(c.vocab));
  }
  return logits;
}

/// Root mean square of the difference over that of `expected`.
inline double relative_rms(const std::vector<float>& found, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(found[i]) - static_cast<double>(expected[i]), 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / size);
}

/// The message that `body` fails with; empty when it does not fail.
template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline std::string file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace larosa
