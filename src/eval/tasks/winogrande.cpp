// {"context_options": [texts], "continuation": text, "gold": index}: partial evaluation (arXiv 1806.02847),
// the answers are contexts and what follows the blank is scored.
#include "eval/tasks/lines.h"

namespace larosa {

std::vector<Item> read_winogrande(const Task&, const std::string& path, int64_t limit) {
  return read_json_lines(path, limit, [](const Fields& line) {
    Item item;
    const std::vector<std::string> contexts = get_texts(line, "context_options", 2);
    const std::string continuation = " " + line.text("continuation");
    item.gold = get_index(line, "gold", contexts.size());
    for (const std::string& context : contexts) item.requests.push_back({context, continuation});
    return item;
  });
}

}  // namespace larosa
