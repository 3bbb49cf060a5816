// Six lines an item: context, index of the right ending, four endings (llama.cpp's hellaswag_val_full.txt).
#include "base/error.h"
#include "eval/tasks/lines.h"
#include "text/unicode.h"

namespace larosa {
namespace {

constexpr size_t kEndings = 4;

void replace_all(std::string& text, std::string_view old, std::string_view by) {
  for (size_t i = text.find(old); i != std::string::npos; i = text.find(old, i + by.size()))
    text.replace(i, old.size(), by);
}

/// lm-evaluation-harness's clean-up: marks of WikiHow's layout and the double spaces that they leave.
std::string cleaned(const std::string& raw) {
  std::string text(stripped_left(stripped_right(raw)));
  replace_all(text, " [title]", ". ");
  for (size_t open = text.find('['); open != std::string::npos; open = text.find('[', open)) {
    const size_t close = text.find(']', open);
    if (close == std::string::npos) break;
    text.erase(open, close - open + 1);
  }
  replace_all(text, "  ", " ");
  return text;
}

/// The file has joined lm-evaluation-harness's ctx_a and ctx_b and lost the capital that it gives ctx_b. Only
/// contexts from ActivityNet have a ctx_b, and only they do not end with a full stop: 3,243 of the 10,042 in
/// the validation set, in each the words behind the last sentence, all in small letters.
std::string with_capital(std::string context) {
  if (context.ends_with('.')) return context;
  size_t begin = 0;
  for (size_t space = context.find(' '); space != std::string::npos; space = context.find(' ', space + 1)) {
    const size_t last = context.find_last_not_of("\"')", space - 1);
    if (space > 0 && last != std::string::npos && std::string_view(".!?").find(context[last]) < 3)
      begin = space + 1;
  }
  begin = context.find_first_not_of(' ', begin);
  if (begin != 0 && begin != std::string::npos && context[begin] >= 'a' && context[begin] <= 'z')
    context[begin] = static_cast<char>(context[begin] - 'a' + 'A');
  return context;
}

}  // namespace

std::vector<Item> read_hellaswag(const Task&, const std::string& path, int64_t limit) {
  const std::vector<std::string> lines = read_lines(path);
  std::vector<Item> items;
  constexpr size_t kLines = 2 + kEndings;
  for (size_t first = 0; first < lines.size() && static_cast<int64_t>(items.size()) < limit;
       first += kLines) {
    const auto line = [&](size_t i) { return path + ":" + std::to_string(first + i + 1); };
    if (lines.size() - first < kLines)
      fail(line(0), ": the item has ", lines.size() - first, " lines, expected ", kLines);
    Item item;
    item.source = line(0);
    const std::string &context = lines[first], &gold = lines[first + 1];
    if (gold.size() != 1 || gold[0] < '0' || gold[0] >= static_cast<char>('0' + kEndings))
      fail(line(1), ": the right ending is ", shown(gold), ", expected 0 to ", kEndings - 1);
    item.gold = gold[0] - '0';
    const std::string query = cleaned(with_capital(context));
    for (size_t i = 0; i < kEndings; ++i) {
      item.choices.push_back(cleaned(lines[first + 2 + i]));
      if (item.choices.back().empty()) fail(line(2 + i), ": the ending is empty");
      item.requests.push_back({query, " " + item.choices.back()});
    }
    items.push_back(std::move(item));
  }
  return items;
}

}  // namespace larosa
