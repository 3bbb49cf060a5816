// JSON from the outside world: bounded depth, no duplicate keys, errors as Error.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace larosa {

/// Parses `text`; throws Error naming `source` for malformed text, nesting beyond 64 levels or a key that
/// stands twice in one object.
nlohmann::json parse_json(std::string_view text, const std::string& source);
/// The same from a file.
nlohmann::json read_json(const std::string& path);

}  // namespace larosa
