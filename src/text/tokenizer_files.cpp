// Tokenizers that are not tokenizer.json: SentencePiece models, tiktoken ranks, vocabulary + merges; and what
// tokenizer_config.json adds.
#include <sentencepiece_processor.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "io/json.h"
#include "text/pipeline.h"
#include "text/unicode.h"

namespace larosa {
namespace {

constexpr size_t kMostTokens = 1 << 22;

// Llama 3's pattern, as its reference tokenizer publishes it.
constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Qwen2: the same with single digits.
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

std::string decode_base64(std::string_view text, const std::string& where) {
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  while (text.ends_with('=')) text.remove_suffix(1);
  for (char c : text) {
    const int v = c >= 'A' && c <= 'Z'   ? c - 'A'
                  : c >= 'a' && c <= 'z' ? c - 'a' + 26
                  : c >= '0' && c <= '9' ? c - '0' + 52
                  : c == '+'             ? 62
                  : c == '/'             ? 63
                                         : -1;
    if (v < 0) fail(where, ": not base64");
    bits = bits << 6 | static_cast<uint32_t>(v);
    if ((count += 6) >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xff);
  }
  return bytes;
}

void add_special(Tokenizer::Data& data, const std::string& content, TokenId id) {
  data.added.push_back({content, id, true, false, false, false, false});
}

}  // namespace

std::unique_ptr<Tokenizer::Data> load_sentencepiece(const std::string& path) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->source = path;
  auto processor = std::make_shared<sentencepiece::SentencePieceProcessor>();
  const auto status = processor->Load(path);
  if (!status.ok()) fail(path, ": not a SentencePiece model: ", status.ToString());
  data->pieces.resize(static_cast<size_t>(processor->GetPieceSize()));
  for (int id = 0; id < processor->GetPieceSize(); ++id) {
    Piece& piece = data->pieces[static_cast<size_t>(id)];
    std::string text = processor->IdToPiece(id);
    if (processor->IsControl(id) || processor->IsUnknown(id)) {
      if (!text.empty()) add_special(*data, text, id);
      continue;
    }
    if (const auto byte = byte_token(text); byte && processor->IsByte(id)) {
      piece = {Piece::Kind::byte, std::string(1, static_cast<char>(*byte)), false};
      continue;
    }
    for (size_t at = 0; (at = text.find("\xe2\x96\x81", at)) != std::string::npos;) text.replace(at, 3, " ");
    piece = {Piece::Kind::text, text, false};
  }
  data->bos = processor->bos_id();
  data->eos = processor->eos_id();
  if (data->bos >= 0) data->prefix = {data->bos};
  data->strip_left = 1;  // the dummy blank that encoding puts in front
  data->sentencepiece = std::move(processor);
  return data;
}

std::unique_ptr<Tokenizer::Data> load_ranks(const std::string& path) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->source = path;
  std::ifstream file(path);
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const std::string where = path + ": line " + std::to_string(number);
    const size_t blank = line.find(' ');
    if (blank == std::string::npos || blank == 0 || line.size() > 4096)
      fail(where, ": expected \"base64 rank\"");
    const std::string piece = to_byte_alphabet(decode_base64(std::string_view(line).substr(0, blank), where));
    const auto id = static_cast<TokenId>(data->bpe.pieces.size());
    if (line.substr(blank + 1) != std::to_string(id))
      fail(where, ": rank ", line.substr(blank + 1), ", expected ", id);
    if (data->bpe.pieces.size() >= kMostTokens) fail(where, ": more than ", kMostTokens, " ranks");
    if (!data->bpe.vocab.emplace(piece, id).second) fail(where, ": the token stands twice");
    data->bpe.pieces.push_back(piece);
    data->pieces.push_back({Piece::Kind::text, from_byte_alphabet(piece), false});
  }
  if (data->pieces.empty()) fail(path, ": holds no ranks");
  for (const std::string& character : byte_alphabet()) {
    if (!data->bpe.vocab.contains(character)) fail(path, ": a single byte has no rank");
  }
  data->bpe.by_rank = data->bpe.ignore_merges = true;
  data->pre_tokenizers = {byte_level(kLlama3Pattern, false, path)};
  // Meta's release appends 256 special tokens, the names below and numbered reserved ones.
  std::vector<std::string> names = {"<|begin_of_text|>",   "<|end_of_text|>",   "", "",          "", "",
                                    "<|start_header_id|>", "<|end_header_id|>", "", "<|eot_id|>"};
  names.resize(256);
  auto id = static_cast<TokenId>(data->pieces.size());
  int reserved = 0;
  for (const std::string& name : names) {
    add_special(*data, name.empty() ? "<|reserved_special_token_" + std::to_string(reserved++) + "|>" : name,
                id++);
  }
  data->bos = data->added[0].id;
  data->eos = data->added[1].id;
  data->prefix = {data->bos};
  return data;
}

std::unique_ptr<Tokenizer::Data> load_vocab_merges(const std::string& vocab, const std::string& merges,
                                                   bool qwen) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->source = vocab;
  const nlohmann::json json = read_json(vocab);
  for (const auto& [piece, id] : json.items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
        id.get<int64_t>() >= static_cast<int64_t>(kMostTokens)) {
      fail(vocab, ": \"", piece, "\" has id ", id.dump(), ", expected 0 to ", kMostTokens - 1);
    }
    const auto index = id.get<size_t>();
    if (data->pieces.size() <= index) data->pieces.resize(index + 1);
    if (data->pieces[index].kind != Piece::Kind::absent)
      fail(vocab, ": \"", piece, "\": id ", index, " stands twice");
    data->pieces[index] = {Piece::Kind::text, from_byte_alphabet(piece), false};
    data->bpe.vocab.emplace(piece, static_cast<TokenId>(index));
  }
  if (data->pieces.empty()) fail(vocab, ": holds no tokens");
  std::ifstream file(merges, std::ios::binary);
  if (!file) fail(merges, ": cannot be opened");
  std::string line;
  int32_t rank = 0;
  while (std::getline(file, line)) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || (rank == 0 && line.starts_with("#version"))) continue;
    const size_t blank = line.find(' ');
    if (blank == std::string::npos) fail(merges, ": merge ", rank, ": expected two pieces");
    add_merge(data->bpe, line.substr(0, blank), line.substr(blank + 1), rank, merges);
    ++rank;
  }
  data->pre_tokenizers = {byte_level(qwen ? kQwen2Pattern : kGpt2Pattern, false, vocab)};
  if (qwen) data->normalizers = {[](std::string text) { return normalized(text, NormalForm::nfc); }};
  if (const auto it = data->bpe.vocab.find("<|endoftext|>"); it != data->bpe.vocab.end()) {
    add_special(*data, "<|endoftext|>", it->second);
    data->bos = data->eos = it->second;
    if (qwen) data->bos = -1;
  }
  return data;
}

namespace {

/// The content of a token field: a string or {"content": …}.
std::string token_content(const nlohmann::json& json, const char* name) {
  const auto it = json.find(name);
  if (it == json.end()) return "";
  if (it->is_string()) return it->get<std::string>();
  const auto content = it->is_object() ? it->find("content") : it->end();
  return it->is_object() && content != it->end() && content->is_string() ? content->get<std::string>() : "";
}

void read_added_tokens(const nlohmann::json& config, const std::string& path, Tokenizer::Data& data) {
  const auto decoder = config.find("added_tokens_decoder");
  if (decoder == config.end() || !decoder->is_object()) return;
  for (const auto& [key, value] : decoder->items()) {
    const bool digits = !key.empty() && key.size() <= 7 &&
                        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || !value.is_object()) fail(path, ": added_tokens_decoder: \"", key, "\" is not a token id");
    const std::string content = token_content(nlohmann::json{{"t", value}}, "t");
    if (content.empty()) fail(path, ": added_tokens_decoder: ", key, ": content is empty");
    const auto known = [&](const AddedToken& t) { return t.content == content; };
    if (std::any_of(data.added.begin(), data.added.end(), known)) continue;
    const auto flag = [&](const char* name) {
      return value.contains(name) && value[name].is_boolean() && value[name].get<bool>();
    };
    const auto id = static_cast<TokenId>(std::stoi(key));
    if (static_cast<size_t>(id) >= kMostTokens)
      fail(path, ": added_tokens_decoder: id ", key, " is too large");
    data.added.push_back({content, id, flag("special"), flag("lstrip"), flag("rstrip"), flag("single_word"),
                          flag("normalized")});
  }
}

}  // namespace

void read_tokenizer_config(const std::string& dir, Tokenizer::Data& data) {
  namespace fs = std::filesystem;
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    const std::string path = (fs::path(dir) / name).string();
    if (!fs::exists(path)) continue;
    const nlohmann::json config = read_json(path);
    read_added_tokens(config, path, data);
    const auto find = [&](const std::string& content) -> TokenId {
      for (const AddedToken& token : data.added) {
        if (token.content == content) return token.id;
      }
      const auto it = data.bpe.vocab.find(content);
      return it == data.bpe.vocab.end() ? -1 : it->second;
    };
    if (const std::string bos = token_content(config, "bos_token"); !bos.empty() && find(bos) >= 0)
      data.bos = find(bos);
    if (const std::string eos = token_content(config, "eos_token"); !eos.empty() && find(eos) >= 0)
      data.eos = find(eos);
  }
}

}  // namespace larosa
