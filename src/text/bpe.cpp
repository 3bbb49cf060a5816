#include "text/bpe.h"

#include <queue>
#include <tuple>

#include "text/unicode.h"

namespace larosa {

bool Bpe::find_merge(TokenId left, TokenId right, Merge& merge) const {
  if (left < 0 || right < 0) return false;
  if (by_rank) {
    const auto it = vocab.find(pieces[static_cast<size_t>(left)] + pieces[static_cast<size_t>(right)]);
    if (it == vocab.end()) return false;
    merge = {it->second, it->second};
    return true;
  }
  const auto it = merges.find(static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right));
  if (it == merges.end()) return false;
  merge = it->second;
  return true;
}

size_t next_word(std::string_view text, size_t begin) {
  for (size_t at = text.find(kBlank, begin); at != std::string_view::npos; at = text.find(kBlank, at + 1)) {
    if (at > begin && !text.substr(begin, at - begin).ends_with(kBlank)) return at;
  }
  return text.size();
}

/// One symbol per character; characters outside the vocabulary become their bytes or the unknown token.
void Bpe::initial(std::string_view word, std::vector<TokenId>& symbols) const {
  bool after_unknown = false;
  for (size_t i = 0, n = 0; i < word.size(); i += n) {
    n = utf8_length(word, i);
    if (n == 0) n = 1;
    const auto it = vocab.find(word.substr(i, n));
    if (it != vocab.end()) {
      symbols.push_back(it->second);
      after_unknown = false;
    } else if (!byte_ids.empty()) {
      for (size_t k = 0; k < n; ++k) symbols.push_back(byte_ids[static_cast<uint8_t>(word[i + k])]);
      after_unknown = false;
    } else if (unknown >= 0) {
      if (!(fuse_unknown && after_unknown)) symbols.push_back(unknown);
      after_unknown = true;
    }
  }
}

void Bpe::finish() {
  cut_at_blank = !by_rank && !ignore_merges && vocab.contains(kBlank);
  for (auto it = vocab.begin(); cut_at_blank && it != vocab.end(); ++it)
    cut_at_blank = next_word(it->first, 0) == it->first.size();
}

void Bpe::encode(std::string_view word, std::vector<TokenId>& ids) const {
  if (word.empty()) return;
  if (ignore_merges) {
    if (const auto it = vocab.find(word); it != vocab.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  // A linked list of symbols and a heap of candidate merges: n log n, so that a word of a megabyte is no
  // trap.
  std::vector<TokenId> symbols;
  initial(word, symbols);
  const int32_t count = static_cast<int32_t>(symbols.size());
  std::vector<int32_t> previous(symbols.size()), next(symbols.size());
  using Candidate =
      std::tuple<int32_t, int32_t, TokenId, TokenId, TokenId>;  // rank, left place, left, right, joined
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
  const auto consider = [&](int32_t left) {
    const int32_t right = next[static_cast<size_t>(left)];
    Merge merge{};
    if (right >= count) return;
    const TokenId a = symbols[static_cast<size_t>(left)], b = symbols[static_cast<size_t>(right)];
    if (find_merge(a, b, merge)) heap.emplace(merge.rank, left, a, b, merge.id);
  };
  for (int32_t i = 0; i < count; ++i) {
    previous[static_cast<size_t>(i)] = i - 1;
    next[static_cast<size_t>(i)] = i + 1;
  }
  for (int32_t i = 0; i + 1 < count; ++i) consider(i);
  while (!heap.empty()) {
    const auto [rank, left, a, b, joined] = heap.top();
    heap.pop();
    const int32_t right = next[static_cast<size_t>(left)];
    if (symbols[static_cast<size_t>(left)] != a || right >= count || symbols[static_cast<size_t>(right)] != b)
      continue;
    symbols[static_cast<size_t>(left)] = joined;
    symbols[static_cast<size_t>(right)] = -1;
    const int32_t after = next[static_cast<size_t>(right)];
    next[static_cast<size_t>(left)] = after;
    if (after < count) previous[static_cast<size_t>(after)] = left;
    if (previous[static_cast<size_t>(left)] >= 0) consider(previous[static_cast<size_t>(left)]);
    consider(left);
  }
  for (int32_t i = 0; i < count; i = next[static_cast<size_t>(i)])
    ids.push_back(symbols[static_cast<size_t>(i)]);
}

}  // namespace larosa
