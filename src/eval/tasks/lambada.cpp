// {"context": text, "continuation": word}: the last word of a passage.
#include "eval/tasks/lines.h"

namespace larosa {

std::vector<Item> read_lambada(const Task&, const std::string& path, int64_t limit) {
  return read_json_lines(path, limit, [](const Fields& line) {
    Item item;
    item.requests.push_back({line.text("context"), " " + line.text("continuation")});
    return item;
  });
}

}  // namespace larosa
