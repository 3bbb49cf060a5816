// What the tests of sparsify share: a small job, and the tolerance of storage.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "calib/sparsify.h"
#include "model_fixture.h"

namespace larosa {

constexpr int64_t kWindow = 32;

class Sparsify : public testing::Test {
 protected:
  void make(const std::string& source, const std::string& output, const SparsifyOptions& base,
            int threads = 2) {
    ThreadPool pool(threads);
    const auto backend = make_cpu_backend({}, pool);
    SparsifyOptions options = base;
    options.source = source;
    options.output = output;
    options.progress = false;
    const auto tokens = some_tokens(load_config(source).vocab, 8 * kWindow, 7);
    sparsify(options, tokens, kWindow, *backend, pool);
  }
  static SparsifyOptions with_sparsity(double sparsity) {
    SparsifyOptions options;
    options.choice.sparsity = sparsity;
    return options;
  }
  ThreadPool pool_{2};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
};

/// Law 3's tolerance: one rounding of every weight to storage, a few dozen products deep.
inline double storage_tolerance(const Model& model) {
  switch (model.layers[0].weights[Projection::wq].dtype) {
    case DType::f32:
      return 2e-5;
    case DType::f16:
      return 5e-3;
    default:
      return 4e-2;
  }
}

inline void expect_same_files(const std::filesystem::path& one, const std::filesystem::path& other) {
  for (const auto& entry : std::filesystem::directory_iterator(one)) {
    const auto name = entry.path().filename();
    EXPECT_TRUE(file_bytes(entry.path().string()) == file_bytes((other / name).string())) << name;
  }
}

inline SparsifyOptions teal(double sparsity, Allocation allocation = Allocation::uniform) {
  SparsifyOptions options;
  options.method = "teal";
  options.choice.sparsity = sparsity;
  options.choice.allocation = allocation;
  return options;
}

}  // namespace larosa
