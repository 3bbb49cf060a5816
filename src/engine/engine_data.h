// What stands behind the public classes of larosa/engine.h.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"
#include "base/thread_pool.h"
#include "larosa/engine.h"
#include "model/model.h"
#include "text/tokenizer.h"

namespace larosa {

struct Engine::Data {
  Data(const std::string& dir, const EngineOptions& options);

  ThreadPool pool;
  std::unique_ptr<Backend> backend;  // uses the pool
  Model model;                       // in the backend's memory
  Tokenizer tokenizer;
};

/// The type of kKvTypes of that name; throws Error for others.
DType kv_dtype(const std::string& name);

}  // namespace larosa
