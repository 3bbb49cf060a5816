// The parts of a tokenizer as data: what text passes through on its way to ids and back.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "text/bpe.h"
#include "text/tokenizer.h"

namespace larosa {

struct AddedToken {
  std::string content;
  TokenId id = 0;
  bool special = false, lstrip = false, rstrip = false, single_word = false, normalized = false;
};

/// Text → text. `first`: the piece starts the input.
using Normalizer = std::function<std::string(std::string text)>;
/// Words → words.
using PreTokenizer = std::function<std::vector<std::string>(std::vector<std::string> words, bool first)>;

/// What one id stands for when decoding.
struct Piece {
  enum class Kind { absent, text, byte };  // byte: one byte of a character written by byte fallback
  Kind kind = Kind::absent;
  std::string bytes;
  bool special = false;
};

struct Tokenizer::Data {
  std::string source;  // file name for messages
  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  Bpe bpe;
  std::vector<AddedToken> added;                        // by add(); after finish() longest content first
  std::array<std::vector<size_t>, 256> added_by_first;  // indices into added
  Vocabulary added_ids;                                 // by content
  std::vector<AddedToken> defaults;  // added by add_defaults() where no file names another token for the id
  std::vector<TokenId> prefix, suffix;  // what the post-processor adds
  std::vector<Piece> pieces;            // by id
  size_t strip_left = 0;                // spaces that decoding takes from the start of the text
  bool config_adds = false;             // prefix and suffix are for tokenizer_config.json to say
  TokenId bos = -1, eos = -1;

  /// Enters an added token. Throws Error naming `where` when its id or its content belongs to another token.
  void add(AddedToken token, const std::string& where);
  /// Adds the defaults that clash with no token. To be called once all files are read.
  void add_defaults();
  /// Orders the added tokens for the search. To be called once, at the end of loading.
  void finish();
  /// The id of a token by its content, or -1.
  TokenId find(std::string_view content) const;
  void encode_plain(const std::string& text, bool first, std::vector<TokenId>& ids) const;
};

/// GPT-2's printable alphabet of bytes: byte ↔ character.
const std::array<std::string, 256>& byte_alphabet();
std::string to_byte_alphabet(std::string_view bytes);
/// The bytes that a piece in the alphabet stands for; the piece itself where a character is outside of it.
std::string from_byte_alphabet(std::string_view piece);

/// Enters the tokens of an object {piece: id}. Throws Error naming `source` and the piece.
void read_vocab(const nlohmann::json& vocab, const std::string& source, Tokenizer::Data& data);
/// Ids that a file may name lie below this.
inline constexpr int64_t kMostTokens = 1 << 22;
/// Enters a token of the vocabulary. Throws Error naming `source` for an id out of range or used twice.
void add_piece(Tokenizer::Data& data, const std::string& piece, int64_t id, const std::string& source);

// Loading, one function per kind of file. `dir` ends without a slash.
std::unique_ptr<Tokenizer::Data> load_tokenizer_json(const std::string& path);
std::unique_ptr<Tokenizer::Data> load_sentencepiece(const std::string& path);
std::unique_ptr<Tokenizer::Data> load_ranks(const std::string& path);
std::unique_ptr<Tokenizer::Data> load_vocab_merges(const std::string& vocab, const std::string& merges,
                                                   bool qwen);
/// bos, eos and added tokens that tokenizer_config.json and special_tokens_map.json name.
void read_tokenizer_config(const std::string& dir, Tokenizer::Data& data);
/// "<0xAB>" → 0xAB, strictly.
std::optional<uint8_t> byte_token(std::string_view piece);
/// Enters a merge list ("a b" lines or pairs) into bpe. Throws Error for an unknown piece.
void add_merge(Bpe& bpe, std::string_view left, std::string_view right, int32_t rank,
               const std::string& source);
/// Splits by GPT-2's or the given pattern, isolating matches, then writes bytes in the byte alphabet.
PreTokenizer byte_level(const std::string& pattern, bool add_prefix_space, const std::string& source);
extern const char* const kGpt2Pattern;

}  // namespace larosa
