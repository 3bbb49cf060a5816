// Tokenizers of tiktoken ranks and of vocabulary + merges; and what tokenizer_config.json adds.
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

AddedToken special(const std::string& content, TokenId id) {
  return {content, id, true, false, false, false, false};
}

}  // namespace

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
    if (static_cast<int64_t>(data->bpe.pieces.size()) >= kMostTokens)
      fail(where, ": more than ", kMostTokens, " ranks");
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
    const bool named = !name.empty();
    data->defaults.push_back(
        special(named ? name : "<|reserved_special_token_" + std::to_string(reserved++) + "|>", id++));
  }
  data->bos = data->defaults[0].id;
  data->eos = data->defaults[1].id;
  data->prefix = {data->bos};
  return data;
}

std::unique_ptr<Tokenizer::Data> load_vocab_merges(const std::string& vocab, const std::string& merges,
                                                   bool qwen) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->source = vocab;
  const nlohmann::json json = read_json(vocab);
  if (!json.is_object() || json.empty()) fail(vocab, ": expected an object of tokens");
  read_vocab(json, vocab, *data);
  for (Piece& piece : data->pieces) piece.bytes = from_byte_alphabet(piece.bytes);
  std::ifstream file(merges, std::ios::binary);
  if (!file) fail(merges, ": cannot be opened");
  std::string line;
  int32_t rank = 0;
  data->bpe.merges.reserve(data->bpe.vocab.size());
  while (std::getline(file, line)) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || (rank == 0 && line.starts_with("#version"))) continue;
    const size_t blank = line.find(' ');
    if (blank == std::string::npos) fail(merges, ": merge ", rank, ": expected two pieces");
    const std::string_view pieces = line;
    add_merge(data->bpe, pieces.substr(0, blank), pieces.substr(blank + 1), rank, merges);
    ++rank;
  }
  data->pre_tokenizers = {byte_level(qwen ? kQwen2Pattern : kGpt2Pattern, false, vocab)};
  if (qwen) data->normalizers = {[](std::string text) { return normalized(text, NormalForm::nfc); }};
  if (const auto it = data->bpe.vocab.find("<|endoftext|>"); it != data->bpe.vocab.end()) {
    data->defaults.push_back(special("<|endoftext|>", it->second));
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
  if (decoder == config.end() || decoder->is_null()) return;
  if (!decoder->is_object()) fail(path, ": added_tokens_decoder: expected an object");
  for (const auto& [key, value] : decoder->items()) {
    const bool digits = !key.empty() && key.size() <= 7 &&
                        std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || !value.is_object()) fail(path, ": added_tokens_decoder: \"", key, "\" is not a token id");
    const std::string where = path + ": added_tokens_decoder." + key;
    const Fields fields(value, path, "added_tokens_decoder." + key + ".");
    const std::string content = fields.text("content");
    const auto id = static_cast<TokenId>(std::stoi(key));
    const auto known = data.added_ids.find(content);
    if (known != data.added_ids.end() && known->second == id) continue;
    data.add({content, id, fields.boolean_or("special", false), fields.boolean_or("lstrip", false),
              fields.boolean_or("rstrip", false), fields.boolean_or("single_word", false),
              fields.boolean_or("normalized", false)},
             where);
  }
}

}  // namespace

void read_tokenizer_config(const std::string& dir, Tokenizer::Data& data) {
  namespace fs = std::filesystem;
  std::vector<std::pair<std::string, nlohmann::json>> configs;
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    const std::string path = (fs::path(dir) / name).string();
    if (!fs::exists(path)) continue;
    configs.emplace_back(path, read_json(path));
    if (!configs.back().second.is_object()) fail(path, ": expected an object");
    read_added_tokens(configs.back().second, path, data);
  }
  data.add_defaults();
  bool add_bos = true, add_eos = false;
  for (const auto& [path, config] : configs) {
    const Fields fields(config, path);
    const auto named = [&](const char* name, TokenId& id) {
      const TokenId found = data.find(token_content(fields.object(), name));
      if (found >= 0) id = found;
    };
    named("bos_token", data.bos);
    named("eos_token", data.eos);
    add_bos = fields.boolean_or("add_bos_token", add_bos);
    add_eos = fields.boolean_or("add_eos_token", add_eos);
  }
  if (data.config_adds) {
    if (add_bos && data.bos >= 0) data.prefix = {data.bos};
    if (add_eos && data.eos >= 0) data.suffix = {data.eos};
  }
}

}  // namespace larosa
