#include "engine/engine_data.h"

#include <algorithm>

#include "base/error.h"

#ifndef LAROSA_VERSION
#error "the build defines LAROSA_VERSION"
#endif

namespace larosa {

const char* version() {
  return LAROSA_VERSION;
}

DType kv_dtype(const std::string& name) {
  for (const DType type : kKvTypes)
    if (name == dtype_name(type)) return type;
  fail("kv ", name, ": expected f32, f16 or int8");
}

Engine::Data::Data(const std::string& dir, const EngineOptions& options)
    : pool(options.threads),
      backend(make_backend(options.device, options.backend, options.products, pool)),
      model(load_model(dir)),
      tokenizer(Tokenizer::load(dir)) {
  if (options.check_tensors) check_finite(model);
  place(model, *backend);
}

Engine::Engine(const std::string& dir, const EngineOptions& options)
    : data_(std::make_unique<Data>(dir, options)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

std::vector<int32_t> Engine::encode(std::string_view text, bool add_special) const {
  return data_->tokenizer.encode(text, add_special);
}

std::string Engine::decode(std::span<const int32_t> ids) const {
  std::vector<int32_t> known;
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab()) fail("token id ", id, " is outside the model's vocabulary of ", vocab());
    if (id < data_->tokenizer.size()) known.push_back(id);
  }
  return data_->tokenizer.decode(known, true);
}

int64_t Engine::context() const {
  return data_->model.config.context;
}

int64_t Engine::vocab() const {
  return data_->model.config.vocab;
}

bool Engine::ends_text(int32_t id) const {
  const std::vector<int32_t>& eos = data_->model.config.eos;
  return std::find(eos.begin(), eos.end(), id) != eos.end();
}

TokenCost Engine::token_cost(int64_t positions, const std::string& kv) const {
  const TokenBytes bytes = token_bytes(data_->model, kv_dtype(kv));
  return {bytes.sparse(positions), bytes.dense(positions)};
}

std::string Engine::describe() const {
  return data_->backend->describe();
}

}  // namespace larosa
