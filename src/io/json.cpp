#include "io/json.h"

#include <cmath>
#include <set>
#include <vector>

#include "base/error.h"
#include "io/mapped_file.h"

namespace larosa {

using nlohmann::json;

json parse_json(std::string_view text, const std::string& source, int max_depth) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > max_depth) fail(source, ": JSON is nested deeper than ", max_depth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      fail(source, ": key ", shown(value), " occurs twice");
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    std::string reason = e.what();
    reason = reason.substr(0, 300);
    for (char& c : reason) c = static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    fail(source, ": malformed JSON: ", reason);
  }
}

json read_json(const std::string& path, int64_t max_bytes, int max_depth) {
  const MappedFile file(path);
  if (file.size() == 0) fail(path, ": file is empty");
  if (file.size() > max_bytes)
    fail(path, ": file has ", file.size(), " bytes, over the limit of ", max_bytes);
  return parse_json({reinterpret_cast<const char*>(file.data()), static_cast<size_t>(file.size())}, path,
                    max_depth);
}

std::string shown(const json& value) {
  constexpr size_t kLongest = 80;
  if (value.is_structured() && value.size() > kLongest) return value.is_array() ? "a long list" : "an object";
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

std::optional<int64_t> integer_in(const json& value, int64_t low, int64_t high) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
    return std::nullopt;
  const auto number = value.get<int64_t>();
  if (number < low || number > high) return std::nullopt;
  return number;
}

Fields::Fields(const json& object, std::string source, std::string prefix)
    : object_(&object), source_(std::move(source)), prefix_(std::move(prefix)) {
  if (!object.is_object()) {
    const std::string name = prefix_.empty() ? "the file" : prefix_.substr(0, prefix_.size() - 1);
    fail(source_, ": ", name, " holds ", shown(object), ", expected an object");
  }
}

const json* Fields::find(const std::string& name) const {
  const auto member = object_->find(name);
  return member == object_->end() || member->is_null() ? nullptr : &*member;
}

const json& Fields::get(const std::string& name) const {
  const json* member = find(name);
  if (!member) fail(source_, ": ", prefix_, name, " is absent");
  return *member;
}

std::optional<int64_t> Fields::find_integer(const std::string& name, int64_t low, int64_t high) const {
  const json* member = find(name);
  if (!member) return std::nullopt;
  const auto value = integer_in(*member, low, high);
  if (!value) {
    refuse(name, "expected an integer from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

int64_t Fields::integer(const std::string& name, int64_t low, int64_t high) const {
  get(name);
  return *find_integer(name, low, high);
}

std::optional<double> Fields::find_number(const std::string& name, double low, double high) const {
  const json* member = find(name);
  if (!member) return std::nullopt;
  const double value = member->is_number() ? member->get<double>() : std::nan("");
  if (!(value >= low && value <= high)) {  // NaN fails as well
    std::ostringstream range;
    range << "expected a number from " << low << " to " << high;
    refuse(name, range.str());
  }
  return value;
}

double Fields::number(const std::string& name, double low, double high) const {
  get(name);
  return *find_number(name, low, high);
}

std::optional<std::string> Fields::find_text(const std::string& name) const {
  const json* member = find(name);
  if (!member) return std::nullopt;
  if (!member->is_string()) refuse(name, "expected a string");
  return member->get<std::string>();
}

std::string Fields::text(const std::string& name) const {
  get(name);
  return *find_text(name);
}

bool Fields::boolean_or(const std::string& name, bool absent) const {
  const json* member = find(name);
  if (!member) return absent;
  if (!member->is_boolean()) refuse(name, "expected true or false");
  return member->get<bool>();
}

std::optional<Fields> Fields::find_object(const std::string& name) const {
  const json* member = find(name);
  if (!member) return std::nullopt;
  return Fields(*member, source_, prefix_ + name + ".");
}

void Fields::refuse(const std::string& name, const std::string& reason) const {
  fail(source_, ": ", prefix_, name, " is ", shown(get(name)), ", ", reason);
}

}  // namespace larosa
