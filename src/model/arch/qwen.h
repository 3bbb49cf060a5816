// What Qwen2 and Qwen3 configs share.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace larosa {
struct ModelConfig;
/// use_sliding_window, sliding_window, max_window_layers, layer_types → window, window_from.
void read_qwen_window(const nlohmann::json& json, const std::string& source, ModelConfig& config);
}  // namespace larosa
