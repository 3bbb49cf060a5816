// {"arguments": [[context, continuation], …], "choices": [texts], "gold": index}: lm-evaluation-harness's own
// requests (dev/lm_eval_export.py). "choices" stands where acc_norm is wanted, "gold" where there are
// alternatives.
#include "eval/tasks/lines.h"

namespace larosa {

std::vector<Item> read_requests(const Task&, const std::string& path, int64_t limit) {
  return read_json_lines(path, limit, [](const Fields& line) {
    Item item;
    const nlohmann::json& arguments = line.get("arguments");
    const auto is_pair = [](const nlohmann::json& a) {
      return a.is_array() && a.size() == 2 && a[0].is_string() && a[1].is_string();
    };
    if (!arguments.is_array() || arguments.empty())
      line.refuse("arguments", "expected a list of [context, continuation]");
    for (const nlohmann::json& a : arguments) {
      if (!is_pair(a)) line.refuse("arguments", "expected a list of [context, continuation]");
      item.requests.push_back({a[0].get<std::string>(), a[1].get<std::string>()});
    }
    if (line.find("choices")) item.choices = get_texts(line, "choices", 1);
    if (line.find("choices") && item.choices.size() != item.requests.size())
      line.refuse("choices", "expected as many as there are arguments");
    if (item.requests.size() > 1) item.gold = get_index(line, "gold", item.requests.size());
    return item;
  });
}

}  // namespace larosa
