#include "text/tokenizer.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "io/json.h"
#include "text/pipeline.h"
#include "text/unicode.h"

namespace larosa {
namespace {

struct Found {
  size_t begin, end;  // of the token with the blanks it swallows
  TokenId id;
};

/// The first added token at or after `from` that `wanted` accepts, the longest one at its place.
std::optional<Found> find_added(const Tokenizer::Data& data, std::string_view text, size_t from,
                                bool normalized, bool specials) {
  for (size_t i = from, step = 1; i < text.size(); i += step) {
    step = 1;
    for (size_t index : data.added_by_first[static_cast<unsigned char>(text[i])]) {
      const AddedToken& token = data.added[index];
      if (token.normalized != normalized || text.substr(i, token.content.size()) != token.content) continue;
      const std::string_view before = text.substr(0, i), behind = text.substr(i + token.content.size());
      // As Hugging Face: the longest token counts, and one that is not wanted here is passed over as a whole.
      if ((token.special && !specials) ||
          (token.single_word && (is_word(last_character(before)) || is_word(first_character(behind))))) {
        step = token.content.size();
        break;
      }
      const size_t left = token.lstrip ? stripped_right(text.substr(from, i - from)).size() : i - from;
      const size_t right = token.rstrip ? behind.size() - stripped_left(behind).size() : 0;
      return Found{from + left, i + token.content.size() + right, token.id};
    }
  }
  return std::nullopt;
}

}  // namespace

void Tokenizer::Data::add(AddedToken token, const std::string& where) {
  if (token.content.empty() || token.content.size() > 4096)
    fail(where, ": content has ", token.content.size(), " bytes, expected 1 to 4096");
  if (token.id < 0 || token.id >= kMostTokens)
    fail(where, ": id is ", token.id, ", expected 0 to ", kMostTokens - 1);
  if (const TokenId known = find(token.content); known >= 0 && known != token.id)
    fail(where, ": id of \"", token.content, "\" is ", token.id, ", elsewhere ", known);
  const auto index = static_cast<size_t>(token.id);
  if (pieces.size() <= index) pieces.resize(index + 1);
  if (pieces[index].kind != Piece::Kind::absent && find(token.content) != token.id)
    fail(where, ": id ", token.id, " of \"", token.content, "\" belongs to another token");
  if (!added_ids.emplace(token.content, token.id).second)
    fail(where, ": \"", token.content, "\" stands twice");
  pieces[index] = {Piece::Kind::text, token.content, token.special};
  added.push_back(std::move(token));
}

void Tokenizer::Data::add_defaults() {
  for (AddedToken& token : defaults) {
    const auto index = static_cast<size_t>(token.id);
    const bool free = index >= pieces.size() || pieces[index].kind == Piece::Kind::absent;
    const TokenId known = find(token.content);
    const bool same = known == token.id && !added_ids.contains(token.content);
    if (same || (free && known < 0)) add(std::move(token), source);
  }
  defaults.clear();
}

TokenId Tokenizer::Data::find(std::string_view content) const {
  const auto it = added_ids.find(content);
  if (it != added_ids.end()) return it->second;
  const auto known = bpe.vocab.find(content);
  return known == bpe.vocab.end() ? -1 : known->second;
}

void Tokenizer::Data::finish() {
  bpe.finish();
  std::stable_sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
  for (size_t i = 0; i < added.size(); ++i) {
    added_by_first[static_cast<unsigned char>(added[i].content[0])].push_back(i);
  }
}

void Tokenizer::Data::encode_plain(const std::string& text, bool first, std::vector<TokenId>& ids) const {
  if (text.empty()) return;
  std::vector<std::string> words = {text};
  for (const PreTokenizer& step : pre_tokenizers) words = step(std::move(words), first);
  std::unordered_map<std::string_view, std::vector<TokenId>> seen;
  const auto encode_word = [&](std::string_view word) {
    auto [it, fresh] = seen.try_emplace(word);
    if (fresh) bpe.encode(word, it->second);
    ids.insert(ids.end(), it->second.begin(), it->second.end());
  };
  for (const std::string& word : words) {
    for (size_t begin = 0, end = 0; begin < word.size(); begin = end) {
      end = bpe.cut_at_blank ? next_word(word, begin) : word.size();
      encode_word(std::string_view(word).substr(begin, end - begin));
    }
  }
}

Tokenizer::Tokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::string& dir) {
  namespace fs = std::filesystem;
  const auto path = [&](const char* name) { return (fs::path(dir) / name).string(); };
  const auto there = [&](const char* name) { return fs::exists(path(name)); };
  std::unique_ptr<Data> data;
  if (there("tokenizer.json")) {
    data = load_tokenizer_json(path("tokenizer.json"));
  } else if (there("tokenizer.model")) {
    std::string start(1, '\0');
    std::FILE* file = std::fopen(path("tokenizer.model").c_str(), "rb");
    const bool protobuf =
        !file || std::fread(start.data(), 1, 1, file) != 1 || start[0] == '\n';  // field 1 of a ModelProto
    if (file) std::fclose(file);
    data = protobuf ? load_sentencepiece(path("tokenizer.model")) : load_ranks(path("tokenizer.model"));
  } else if (there("vocab.json") && there("merges.txt")) {
    bool qwen = false;
    if (there("tokenizer_config.json")) {
      const nlohmann::json config = read_json(path("tokenizer_config.json"));
      const auto name = config.find("tokenizer_class");
      qwen = name != config.end() && name->is_string() &&
             name->get_ref<const std::string&>().starts_with("Qwen2");
    }
    data = load_vocab_merges(path("vocab.json"), path("merges.txt"), qwen);
  } else if (there("encoder.json") && there("vocab.bpe")) {
    data = load_vocab_merges(path("encoder.json"), path("vocab.bpe"), false);
  } else {
    fail(dir, ": no tokenizer.json, tokenizer.model or vocab.json with merges.txt");
  }
  read_tokenizer_config(dir, *data);
  data->finish();
  return Tokenizer(std::move(data));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  const Data& d = *data_;
  const std::string valid = to_valid_utf8(text);
  std::vector<TokenId> ids;
  if (add_special) ids = d.prefix;
  const auto normalize = [&](std::string part) {
    for (const Normalizer& step : d.normalizers) part = step(std::move(part));
    return part;
  };
  // As Hugging Face: tokens that are not normalised are cut out of the raw text, the others of the normalised
  // parts.
  const auto encode_normalized = [&](const std::string& raw, bool first) {
    const std::string part = normalize(raw);
    size_t from = 0;
    while (const auto found = find_added(d, part, from, true, parse_special)) {
      d.encode_plain(part.substr(from, found->begin - from), first && from == 0, ids);
      ids.push_back(found->id);
      from = found->end;
    }
    d.encode_plain(part.substr(from), first && from == 0, ids);
  };
  size_t from = 0;
  while (const auto found = find_added(d, valid, from, false, parse_special)) {
    if (found->begin > from) encode_normalized(valid.substr(from, found->begin - from), from == 0);
    ids.push_back(found->id);
    from = found->end;
  }
  if (from < valid.size()) encode_normalized(valid.substr(from), from == 0);
  if (add_special) ids.insert(ids.end(), d.suffix.begin(), d.suffix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  TextStream stream(*this, skip_special);
  std::string text;
  for (TokenId id : ids) text += stream.push(id);
  return text + stream.finish();
}

int64_t Tokenizer::size() const {
  return static_cast<int64_t>(data_->pieces.size());
}
TokenId Tokenizer::bos() const {
  return data_->bos;
}
TokenId Tokenizer::eos() const {
  return data_->eos;
}
bool Tokenizer::adds_special() const {
  return !data_->prefix.empty() || !data_->suffix.empty();
}

TokenId Tokenizer::find(std::string_view content) const {
  return data_->find(content);
}

TextStream::TextStream(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(&tokenizer), skip_special_(skip_special), strip_(tokenizer.data_->strip_left) {}

std::string TextStream::push(TokenId id) {
  const auto& pieces = tokenizer_->data_->pieces;
  if (id < 0 || static_cast<size_t>(id) >= pieces.size()) {
    fail(tokenizer_->data_->source, ": token id ", id, " is outside [0, ", pieces.size(), ")");
  }
  const Piece& piece = pieces[static_cast<size_t>(id)];
  if (piece.kind == Piece::Kind::absent || (piece.special && skip_special_)) return "";
  if (piece.kind == Piece::Kind::byte) {
    bytes_ += piece.bytes;  // a run of byte tokens is judged as a whole, when it ends
    return "";
  }
  std::string text = end_of_bytes();
  pending_ += piece.bytes;
  const size_t held = incomplete_tail(pending_);
  text += to_valid_utf8(std::string_view(pending_).substr(0, pending_.size() - held));
  pending_.erase(0, pending_.size() - held);
  return stripped(std::move(text));
}

/// Hugging Face's byte fallback: a run of byte tokens that is no valid text gives one U+FFFD per byte.
std::string TextStream::end_of_bytes() {
  std::string text;
  bool valid = true;
  for (size_t i = 0, n = 0; i < bytes_.size() && valid; i += n) valid = (n = utf8_length(bytes_, i)) > 0;
  if (valid) {
    text = bytes_;
  } else {
    for (size_t i = 0; i < bytes_.size(); ++i) text += "\xef\xbf\xbd";
  }
  bytes_.clear();
  return text;
}

std::string TextStream::stripped(std::string text) {
  size_t blanks = 0;
  while (blanks < strip_ && blanks < text.size() && text[blanks] == ' ') ++blanks;
  if (!text.empty()) strip_ = blanks == text.size() ? strip_ - blanks : 0;
  return text.substr(blanks);
}

std::string TextStream::finish() {
  std::string text = end_of_bytes() + to_valid_utf8(pending_);
  pending_.clear();
  return stripped(std::move(text));
}

}  // namespace larosa
