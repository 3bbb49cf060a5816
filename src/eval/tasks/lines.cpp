#include "eval/tasks/lines.h"

#include "base/error.h"
#include "io/files.h"
#include "text/unicode.h"

namespace larosa {

std::vector<std::string> read_lines(const std::string& path) {
  const std::string text = to_valid_utf8(read_file(path));
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.emplace_back(text, begin, end - begin);
    if (lines.back().ends_with('\r')) lines.back().pop_back();
    begin = end + 1;
  }
  return lines;
}

std::vector<Item> read_json_lines(const std::string& path, int64_t limit,
                                  const std::function<Item(const Fields& line)>& item) {
  std::vector<Item> items;
  int64_t number = 0;
  for (const std::string& line : read_lines(path)) {
    if (static_cast<int64_t>(items.size()) == limit) break;
    const std::string source = path + ":" + std::to_string(++number);
    const nlohmann::json object = parse_json(line, source);
    if (!object.is_object()) fail(source, ": the line holds ", shown(object), ", expected an object");
    items.push_back(item(Fields(object, source)));
    items.back().source = source;
  }
  return items;
}

std::vector<std::string> get_texts(const Fields& line, const std::string& name, size_t least) {
  const nlohmann::json& list = line.get(name);
  std::vector<std::string> texts;
  if (list.is_array()) {
    for (const nlohmann::json& text : list)
      if (text.is_string()) texts.push_back(text.get<std::string>());
  }
  if (!list.is_array() || texts.size() != list.size() || texts.size() < least)
    line.refuse(name, "expected a list of at least " + std::to_string(least) + " strings");
  return texts;
}

int64_t get_index(const Fields& line, const std::string& name, size_t size) {
  return line.integer(name, 0, static_cast<int64_t>(size) - 1);
}

}  // namespace larosa
