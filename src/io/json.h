// JSON from files: parsed with limits, read through typed getters. Whatever a file holds, the outcome is a
// value or an Error that names the file and the field.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace larosa {

/// Parses `text`; `source` is its name in messages. Throws Error for malformed JSON, a key that occurs twice
/// in one object, and nesting deeper than `max_depth`.
nlohmann::json parse_json(std::string_view text, const std::string& source, int max_depth = 64);
/// The same for the file at `path`, of at most `max_bytes`.
nlohmann::json read_json(const std::string& path, int64_t max_bytes = int64_t{1} << 28, int max_depth = 64);

/// A value as it stands in the file, cut to fit a one-line message.
std::string shown(const nlohmann::json& value);

/// Typed reading of one JSON object. A member that is null counts as absent, as in Hugging Face's files. All
/// getters throw Error (source, field, what it is, what it should be).
class Fields {
 public:
  /// `object` must outlive this. Throws when it is no object; `prefix` comes before field names in messages.
  Fields(const nlohmann::json& object, std::string source, std::string prefix = "");

  /// The member, or null where absent.
  const nlohmann::json* find(const std::string& name) const;
  const nlohmann::json& get(const std::string& name) const;

  int64_t integer(const std::string& name, int64_t low, int64_t high) const;
  std::optional<int64_t> find_integer(const std::string& name, int64_t low, int64_t high) const;
  /// A finite number, integer or not, in [low, high].
  double number(const std::string& name, double low, double high) const;
  std::optional<double> find_number(const std::string& name, double low, double high) const;
  std::string text(const std::string& name) const;
  std::optional<std::string> find_text(const std::string& name) const;
  bool boolean_or(const std::string& name, bool absent) const;
  /// The member as an object, or nothing.
  std::optional<Fields> find_object(const std::string& name) const;

  /// Throws Error "source: field is value, reason".
  [[noreturn]] void refuse(const std::string& name, const std::string& reason) const;

  const std::string& source() const { return source_; }
  const nlohmann::json& object() const { return *object_; }

 private:
  const nlohmann::json* object_;
  std::string source_, prefix_;
};

/// A JSON integer in [low, high], or nothing.
std::optional<int64_t> integer_in(const nlohmann::json& value, int64_t low, int64_t high);

}  // namespace larosa
