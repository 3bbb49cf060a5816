// {"query": text, "choices": [texts], "gold": index}: every answer is a continuation of the one query.
#include "eval/tasks/lines.h"

namespace larosa {

std::vector<Item> read_multiple_choice(const Task& task, const std::string& path, int64_t limit) {
  return read_json_lines(path, limit, [&task](const Fields& line) {
    Item item;
    std::string query = line.text("query");
    if (!query.starts_with(task.lead)) line.refuse("query", "expected a text that starts with " + task.lead);
    query = query.substr(task.lead.size()) + task.ending;
    item.choices = get_texts(line, "choices", 2);
    item.gold = get_index(line, "gold", item.choices.size());
    for (const std::string& choice : item.choices) item.requests.push_back({query, " " + choice});
    return item;
  });
}

}  // namespace larosa
