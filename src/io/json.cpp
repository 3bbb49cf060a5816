#include "io/json.h"

#include <fstream>
#include <iterator>
#include <set>
#include <vector>

#include "base/error.h"

namespace larosa {

using nlohmann::json;

json parse_json(std::string_view text, const std::string& source) {
  constexpr int kDeepest = 64;
  std::vector<std::set<std::string>> keys;
  const json::parser_callback_t check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kDeepest) fail(source, ": nested deeper than ", kDeepest, " levels");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      fail(source, ": the key ", value.dump(), " stands twice");
    }
    return true;
  };
  try {
    json parsed = json::parse(text, check);
    if (!parsed.is_object()) fail(source, ": is not a JSON object");
    return parsed;
  } catch (const json::exception& e) {
    fail(source, ": ", e.what());
  }
}

json read_json(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, ": cannot be opened");
  return parse_json(std::string{std::istreambuf_iterator<char>(file), {}}, path);
}

}  // namespace larosa
