#include "text/pipeline.h"

#include "base/error.h"
#include "io/json.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace larosa {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

const std::array<std::string, 256>& byte_alphabet() {
  static const std::array<std::string, 256> alphabet = [] {
    std::array<std::string, 256> a;
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      append_utf8(a[b], printable ? b : next++);
    }
    return a;
  }();
  return alphabet;
}

std::string to_byte_alphabet(std::string_view bytes) {
  std::string text;
  for (char c : bytes) text += byte_alphabet()[static_cast<unsigned char>(c)];
  return text;
}

std::string from_byte_alphabet(std::string_view piece) {
  static const auto reverse = [] {
    std::unordered_map<std::string, char, StringHash, std::equal_to<>> map;
    for (size_t b = 0; b < 256; ++b) map[byte_alphabet()[b]] = static_cast<char>(b);
    return map;
  }();
  std::string bytes;
  for (size_t i = 0, n = 0; i < piece.size(); i += n) {
    n = utf8_length(piece, i);
    const auto it = n ? reverse.find(piece.substr(i, n)) : reverse.end();
    if (it == reverse.end()) return std::string(piece);
    bytes += it->second;
  }
  return bytes;
}

std::optional<uint8_t> byte_token(std::string_view piece) {
  const auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
  };
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return std::nullopt;
  const int high = digit(piece[3]), low = digit(piece[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<uint8_t>(high * 16 + low);
}

void add_piece(Tokenizer::Data& data, const std::string& piece, int64_t id, const std::string& source) {
  if (id < 0 || id >= kMostTokens)
    fail(source, ": token \"", piece, "\": id is ", id, ", expected 0 to ", kMostTokens - 1);
  const auto index = static_cast<size_t>(id);
  if (data.pieces.size() <= index) data.pieces.resize(index + 1);
  if (data.pieces[index].kind != Piece::Kind::absent)
    fail(source, ": token \"", piece, "\": id ", id, " stands twice");
  if (!data.bpe.vocab.emplace(piece, static_cast<TokenId>(id)).second)
    fail(source, ": token \"", piece, "\" stands twice");
  data.pieces[index] = {Piece::Kind::text, piece, false};
}

void read_vocab(const nlohmann::json& vocab, const std::string& source, Tokenizer::Data& data) {
  data.bpe.vocab.reserve(vocab.size());
  data.pieces.reserve(vocab.size());
  for (const auto& [piece, id] : vocab.items()) {
    const auto whole = integer_in(id, 0, kMostTokens - 1);
    if (!whole)
      fail(source, ": token \"", piece, "\": id is ", shown(id), ", expected 0 to ", kMostTokens - 1);
    add_piece(data, piece, *whole, source);
  }
}

void add_merge(Bpe& bpe, std::string_view left, std::string_view right, int32_t rank,
               const std::string& source) {
  const auto id = [&](std::string_view piece) {
    const auto it = bpe.vocab.find(piece);
    if (it == bpe.vocab.end())
      fail(source, ": merge ", rank, " \"", left, " ", right, "\": \"", piece, "\" is not in the vocabulary");
    return it->second;
  };
  const uint64_t key = static_cast<uint64_t>(id(left)) << 32 | static_cast<uint32_t>(id(right));
  static thread_local std::string joined;  // one buffer for hundreds of thousands of merges
  joined.assign(left).append(right);
  bpe.merges[key] = {rank, id(joined)};
}

PreTokenizer byte_level(const std::string& pattern, bool add_prefix_space, const std::string& source) {
  std::optional<Regex> regex;
  if (!pattern.empty()) regex.emplace(pattern, source);
  return [regex, add_prefix_space](std::vector<std::string> words, bool) {
    std::vector<std::string> result;
    for (std::string& word : words) {
      if (add_prefix_space && !word.starts_with(' ')) word = ' ' + word;
      if (!regex) {
        result.push_back(to_byte_alphabet(word));
        continue;
      }
      size_t last = 0;
      regex->each_match(word, [&](size_t begin, size_t end) {
        if (begin > last)
          result.push_back(to_byte_alphabet(std::string_view(word).substr(last, begin - last)));
        result.push_back(to_byte_alphabet(std::string_view(word).substr(begin, end - begin)));
        last = end;
      });
      if (last < word.size()) result.push_back(to_byte_alphabet(std::string_view(word).substr(last)));
    }
    return result;
  };
}

}  // namespace larosa
