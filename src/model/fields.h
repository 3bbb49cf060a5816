// Typed, bounded reading of config.json fields: every error names the file and the field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace larosa {

/// The field, or null where it is absent or null.
const nlohmann::json* find_field(const nlohmann::json& json, const char* name);

/// A whole number in [least, most]; the fallback where the field is absent, else Error.
int64_t int_field(const nlohmann::json& json, const std::string& source, const char* name, int64_t least,
                  int64_t most, std::optional<int64_t> fallback = std::nullopt);
/// A finite number in (above, most].
double number_field(const nlohmann::json& json, const std::string& source, const char* name, double above,
                    double most, std::optional<double> fallback = std::nullopt);
bool bool_field(const nlohmann::json& json, const std::string& source, const char* name, bool fallback);
std::string text_field(const nlohmann::json& json, const std::string& source, const char* name,
                       const std::string& fallback);

/// Throws Error "…: field NAME: reason" when a boolean field is true.
void refuse_true(const nlohmann::json& json, const std::string& source, const char* name, const char* reason);

}  // namespace larosa
