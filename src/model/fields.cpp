#include "model/fields.h"

#include <cmath>

#include "base/error.h"

namespace larosa {

using nlohmann::json;

const json* find_field(const json& j, const char* name) {
  const auto it = j.find(name);
  return it == j.end() || it->is_null() ? nullptr : &*it;
}

int64_t int_field(const json& j, const std::string& source, const char* name, int64_t least, int64_t most,
                  std::optional<int64_t> fallback) {
  const json* field = find_field(j, name);
  if (!field && fallback) return *fallback;
  if (!field) fail(source, ": field ", name, " is missing");
  const bool whole =
      field->is_number_integer() && (!field->is_number_unsigned() || field->get<uint64_t>() <= INT64_MAX);
  if (!whole || field->get<int64_t>() < least || field->get<int64_t>() > most) {
    fail(source, ": field ", name, " is ", field->dump(), ", expected a whole number from ", least, " to ",
         most);
  }
  return field->get<int64_t>();
}

double number_field(const json& j, const std::string& source, const char* name, double above, double most,
                    std::optional<double> fallback) {
  const json* field = find_field(j, name);
  if (!field && fallback) return *fallback;
  if (!field) fail(source, ": field ", name, " is missing");
  if (!field->is_number() || !(field->get<double>() > above && field->get<double>() <= most)) {
    fail(source, ": field ", name, " is ", field->dump(), ", expected a number above ", above,
         " and at most ", most);
  }
  return field->get<double>();
}

bool bool_field(const json& j, const std::string& source, const char* name, bool fallback) {
  const json* field = find_field(j, name);
  if (!field) return fallback;
  if (!field->is_boolean()) fail(source, ": field ", name, " is ", field->dump(), ", expected true or false");
  return field->get<bool>();
}

std::string text_field(const json& j, const std::string& source, const char* name,
                       const std::string& fallback) {
  const json* field = find_field(j, name);
  if (!field) return fallback;
  if (!field->is_string()) fail(source, ": field ", name, " is ", field->dump(), ", expected a string");
  return field->get<std::string>();
}

void refuse_true(const json& j, const std::string& source, const char* name, const char* reason) {
  if (bool_field(j, source, name, false)) fail(source, ": field ", name, ": ", reason);
}

}  // namespace larosa
