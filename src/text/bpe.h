// Byte-pair encoding of one word.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/tokenizer.h"

namespace larosa {

inline constexpr std::string_view kBlank = "\xe2\x96\x81";  // ▁, SentencePiece's blank

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
using Vocabulary = std::unordered_map<std::string, TokenId, StringHash, std::equal_to<>>;

/// Where the word that begins at `begin` ends: before the first ▁ that follows another character, or at the
/// end.
size_t next_word(std::string_view text, size_t begin);

struct Bpe {
  Vocabulary vocab;
  struct Merge {
    int32_t rank;
    TokenId id;
  };
  std::unordered_map<uint64_t, Merge> merges;  // key: left id << 32 | right id
  std::vector<std::string> pieces;             // by id; needed where merges come from ranks
  bool by_rank = false;                        // tiktoken: the rank of a merge is the id of the joined piece
  bool ignore_merges = false;                  // a whole word that is a token needs no merging
  bool fuse_unknown = false;
  TokenId unknown = -1;
  std::vector<TokenId> byte_ids;  // 256 ids of <0x00> … for byte fallback, else empty
  bool cut_at_blank = false;      // no merge joins ▁ to a character before it: words may be cut there

  /// Sets cut_at_blank. To be called once the vocabulary is complete.
  void finish();
  /// Appends the ids of `word` (valid UTF-8, in the vocabulary's alphabet).
  void encode(std::string_view word, std::vector<TokenId>& ids) const;

 private:
  bool find_merge(TokenId left, TokenId right, Merge& merge) const;
  void initial(std::string_view word, std::vector<TokenId>& symbols) const;
};

}  // namespace larosa
