// Hugging Face's tokenizer.json. Every component is read from the file; a kind that is not known is refused
// by name.
#include <algorithm>

#include "base/error.h"
#include "io/json.h"
#include "text/pipeline.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace larosa {
namespace {

using nlohmann::json;
const std::string kMeta(kBlank);

/// A component of the file with its place, for messages.
struct Node {
  const json& value;
  std::string where;

  bool has(const char* name) const {
    return value.is_object() && value.contains(name) && !value[name].is_null();
  }
  Node at(const char* name) const {
    if (!has(name)) fail(where, ": field ", name, " is missing");
    return {value[name], where + "." + name};
  }
  std::string text() const {
    if (!value.is_string()) fail(where, ": expected a string");
    return value.get<std::string>();
  }
  bool flag(const char* name, bool fallback) const {
    if (!has(name)) return fallback;
    if (!value[name].is_boolean()) fail(where, ".", name, ": expected true or false");
    return value[name].get<bool>();
  }
  int64_t whole(int64_t least, int64_t most) const {
    if (!value.is_number_integer() || value.get<int64_t>() < least || value.get<int64_t>() > most) {
      fail(where, ": is ", value.dump(), ", expected a whole number from ", least, " to ", most);
    }
    return value.get<int64_t>();
  }
  std::vector<Node> list() const {
    if (!value.is_array()) fail(where, ": expected a list");
    std::vector<Node> nodes;
    for (size_t i = 0; i < value.size(); ++i)
      nodes.push_back({value[i], where + "[" + std::to_string(i) + "]"});
    return nodes;
  }
  std::string type() const { return at("type").text(); }
  [[noreturn]] void unknown() const { fail(where, ": type \"", type(), "\" is not supported"); }
};

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  if (from.empty()) return;
  std::string result;
  size_t last = 0;
  for (size_t at = 0; (at = text.find(from, last)) != std::string::npos; last = at + from.size()) {
    result.append(text, last, at - last).append(to);
  }
  text = result.append(text, last, std::string::npos);
}

void read_normalizer(const Node& node, std::vector<Normalizer>& steps) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const Node& part : node.at("normalizers").list()) read_normalizer(part, steps);
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    const NormalForm form = type == "NFC"    ? NormalForm::nfc
                            : type == "NFD"  ? NormalForm::nfd
                            : type == "NFKC" ? NormalForm::nfkc
                                             : NormalForm::nfkd;
    steps.push_back([form](std::string text) { return normalized(text, form); });
  } else if (type == "Lowercase") {
    steps.push_back([](std::string text) { return lowered(text); });
  } else if (type == "Prepend") {
    steps.push_back([prefix = node.at("prepend").text()](std::string text) {
      return text.empty() ? text : prefix + text;
    });
  } else if (type == "Replace") {
    const Node pattern = node.at("pattern");
    if (pattern.has("Regex")) {
      steps.push_back([regex = Regex(pattern.at("Regex").text(), pattern.where),
                       to = node.at("content").text()](std::string text) {
        std::string result;
        size_t last = 0;
        regex.each_match(text, [&](size_t begin, size_t end) {
          result.append(text, last, begin - last).append(to);
          last = end;
        });
        return result.append(text, last, std::string::npos);
      });
      return;
    }
    steps.push_back([from = pattern.at("String").text(), to = node.at("content").text()](std::string text) {
      replace_all(text, from, to);
      return text;
    });
  } else if (type == "Strip") {
    steps.push_back(
        [left = node.flag("strip_left", true), right = node.flag("strip_right", true)](std::string text) {
          std::string_view kept = text;
          if (left) kept = stripped_left(kept);
          if (right) kept = stripped_right(kept);
          return std::string(kept);
        });
  } else {
    node.unknown();
  }
}

enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior read_behavior(const Node& node) {
  const std::string name = node.text();
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  fail(node.where, ": \"", name, "\" is not supported");
}

/// Cuts every word at the matches of a pattern.
PreTokenizer splitter(const Regex& regex, Behavior behavior, bool invert) {
  return [=](std::vector<std::string> words, bool) {
    std::vector<std::string> result;
    for (const std::string& word : words) {
      std::vector<std::pair<std::string, bool>> parts;  // text, is a delimiter
      size_t last = 0;
      const auto add = [&](size_t begin, size_t end, bool match) {
        if (end > begin) parts.emplace_back(word.substr(begin, end - begin), match != invert);
      };
      regex.each_match(word, [&](size_t begin, size_t end) {
        add(last, begin, false);
        add(begin, end, true);
        last = end;
      });
      add(last, word.size(), false);
      std::string carried;
      bool previous = false, any = false;
      for (auto& [text, match] : parts) {
        const bool joins = any && ((behavior == Behavior::merged_with_previous && match && !previous) ||
                                   (behavior == Behavior::contiguous && match == previous));
        if (behavior == Behavior::merged_with_next && match) {
          if (!carried.empty()) result.push_back(carried);
          carried = text;
        } else if (joins) {
          result.back() += text;
        } else if (!(behavior == Behavior::removed && match)) {
          result.push_back(carried + text);
          carried.clear();
        }
        previous = match;
        any = true;
      }
      if (!carried.empty()) result.push_back(carried);
    }
    return result;
  };
}

std::string quoted(const std::string& literal) {
  std::string pattern;
  for (char c : literal) {
    if (std::string_view("\\^$.[]|()?*+{}-#&~ ").find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

PreTokenizer metaspace(const Node& node) {
  const std::string replacement = node.has("replacement") ? node.at("replacement").text() : kMeta;
  std::string scheme = node.flag("add_prefix_space", true) ? "always" : "never";
  if (node.has("prepend_scheme")) scheme = node.at("prepend_scheme").text();
  const bool split = node.flag("split", true);
  return [=](std::vector<std::string> words, bool first) {
    std::vector<std::string> result;
    for (std::string& word : words) {
      replace_all(word, " ", replacement);
      if ((scheme == "always" || (scheme == "first" && first)) && !word.starts_with(replacement))
        word = replacement + word;
      size_t begin = 0;
      for (size_t at = split ? word.find(replacement, 1) : std::string::npos; at != std::string::npos;
           at = word.find(replacement, at + 1)) {
        result.push_back(word.substr(begin, at - begin));
        begin = at;
      }
      result.push_back(word.substr(begin));
    }
    return result;
  };
}

void read_pre_tokenizer(const Node& node, std::vector<PreTokenizer>& steps) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const Node& part : node.at("pretokenizers").list()) read_pre_tokenizer(part, steps);
  } else if (type == "ByteLevel") {
    steps.push_back(byte_level(node.flag("use_regex", true) ? kGpt2Pattern : "",
                               node.flag("add_prefix_space", true), node.where));
  } else if (type == "Split") {
    const Node pattern = node.at("pattern");
    const std::string text =
        pattern.has("Regex") ? pattern.at("Regex").text() : quoted(pattern.at("String").text());
    steps.push_back(
        splitter(Regex(text, pattern.where), read_behavior(node.at("behavior")), node.flag("invert", false)));
  } else if (type == "Digits") {
    const bool each = node.flag("individual_digits", false);
    steps.push_back(
        splitter(Regex("\\p{N}", node.where), each ? Behavior::isolated : Behavior::contiguous, false));
  } else if (type == "Metaspace") {
    steps.push_back(metaspace(node));
  } else if (type == "WhitespaceSplit") {
    steps.push_back(splitter(Regex("\\s+", node.where), Behavior::removed, false));
  } else if (type == "Whitespace") {
    steps.push_back(splitter(Regex("\\w+|[^\\w\\s]+", node.where), Behavior::removed, true));
  } else {
    node.unknown();
  }
}

void read_model(const Node& model, Tokenizer::Data& data) {
  if (model.has("type") && model.type() != "BPE") model.unknown();
  if (model.has("dropout")) fail(model.where, ".dropout: is not supported");
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(name) && !model.at(name).text().empty()) fail(model.where, ".", name, ": is not supported");
  }
  const Node vocab = model.at("vocab");
  if (!vocab.value.is_object() || vocab.value.empty()) fail(vocab.where, ": expected an object of tokens");
  read_vocab(vocab.value, vocab.where, data);
  const Node merges = model.at("merges");
  if (!merges.value.is_array()) fail(merges.where, ": expected a list");
  data.bpe.merges.reserve(merges.value.size());
  int32_t rank = 0;
  for (const json& merge : merges.value) {
    std::string_view left, right;
    if (merge.is_string()) {
      const std::string_view text = merge.get_ref<const std::string&>();
      const size_t blank = text.find(' ');
      if (blank == text.npos) fail(merges.where, "[", rank, "]: expected two pieces");
      left = text.substr(0, blank);
      right = text.substr(blank + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else {
      fail(merges.where, "[", rank, "]: expected two pieces");
    }
    add_merge(data.bpe, left, right, rank++, merges.where);
  }
  data.bpe.ignore_merges = model.flag("ignore_merges", false);
  data.bpe.fuse_unknown = model.flag("fuse_unk", false);
  if (model.has("unk_token")) {
    const auto it = data.bpe.vocab.find(model.at("unk_token").text());
    if (it == data.bpe.vocab.end()) fail(model.where, ".unk_token: is not in the vocabulary");
    data.bpe.unknown = it->second;
  }
  if (model.flag("byte_fallback", false)) {
    data.bpe.byte_ids.assign(256, -1);
    for (const auto& [piece, id] : data.bpe.vocab) {
      if (const auto byte = byte_token(piece)) data.bpe.byte_ids[*byte] = id;
    }
    if (std::find(data.bpe.byte_ids.begin(), data.bpe.byte_ids.end(), -1) != data.bpe.byte_ids.end()) {
      fail(model.where, ".byte_fallback: the vocabulary lacks some of <0x00> to <0xFF>");
    }
  }
}

void read_added(const Node& root, Tokenizer::Data& data) {
  if (!root.has("added_tokens")) return;
  for (const Node& node : root.at("added_tokens").list()) {
    AddedToken token;
    token.content = node.at("content").text();
    token.id = static_cast<TokenId>(node.at("id").whole(0, kMostTokens - 1));
    token.special = node.flag("special", false);
    token.lstrip = node.flag("lstrip", false);
    token.rstrip = node.flag("rstrip", false);
    token.single_word = node.flag("single_word", false);
    token.normalized = node.flag("normalized", !token.special);
    data.add(std::move(token), node.where);
  }
}

TokenId token_id(const Node& node, const Tokenizer::Data& data) {
  const TokenId id = data.find(node.text());
  if (id < 0) fail(node.where, ": token \"", node.text(), "\" is unknown");
  return id;
}

void read_post_processor(const Node& node, Tokenizer::Data& data) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const Node& part : node.at("processors").list()) read_post_processor(part, data);
  } else if (type == "TemplateProcessing") {
    bool behind = false;
    for (const Node& part : node.at("single").list()) {
      if (part.has("Sequence")) {
        behind = true;
        continue;
      }
      (behind ? data.suffix : data.prefix).push_back(token_id(part.at("SpecialToken").at("id"), data));
    }
  } else if (type != "ByteLevel") {  // ByteLevel only trims offsets
    node.unknown();
  }
}

/// Turns the pieces into what they decode to. `byte_level` and the blank's stand-in are what the decoders ask
/// for.
void read_decoder(const Node& node, Tokenizer::Data& data) {
  const std::string type = node.type();
  const auto each = [&](const auto& change) {
    for (Piece& piece : data.pieces) {
      if (piece.kind == Piece::Kind::text) change(piece);
    }
  };
  if (type == "Sequence") {
    for (const Node& part : node.at("decoders").list()) read_decoder(part, data);
  } else if (type == "ByteLevel") {
    each([](Piece& piece) { piece.bytes = from_byte_alphabet(piece.bytes); });
  } else if (type == "ByteFallback") {
    each([](Piece& piece) {
      if (const auto byte = byte_token(piece.bytes))
        piece = {Piece::Kind::byte, std::string(1, static_cast<char>(*byte)), false};
    });
  } else if (type == "Replace") {
    const Node pattern = node.at("pattern");
    if (!pattern.has("String")) fail(pattern.where, ": only String patterns are supported");
    const std::string from = pattern.at("String").text(), to = node.at("content").text();
    each([&](Piece& piece) { replace_all(piece.bytes, from, to); });
  } else if (type == "Metaspace") {
    const std::string from = node.has("replacement") ? node.at("replacement").text() : kMeta;
    each([&](Piece& piece) { replace_all(piece.bytes, from, " "); });
    const bool never = node.has("prepend_scheme") && node.at("prepend_scheme").text() == "never";
    data.strip_left = never ? 0 : 1;
  } else if (type == "Strip") {
    if (node.at("content").text() != " " || node.at("stop").whole(0, 1 << 20) != 0)
      fail(node.where, ": only blanks at the start are supported");
    data.strip_left = static_cast<size_t>(node.at("start").whole(0, 16));
  } else if (type != "Fuse") {
    node.unknown();
  }
}

}  // namespace

std::unique_ptr<Tokenizer::Data> load_tokenizer_json(const std::string& path) {
  const json parsed = read_json(path);
  const Node root{parsed, path};
  auto data = std::make_unique<Tokenizer::Data>();
  data->source = path;
  read_model({root.at("model").value, path + ": model"}, *data);
  read_added(root, *data);
  if (root.has("normalizer"))
    read_normalizer({root.value["normalizer"], path + ": normalizer"}, data->normalizers);
  if (root.has("pre_tokenizer"))
    read_pre_tokenizer({root.value["pre_tokenizer"], path + ": pre_tokenizer"}, data->pre_tokenizers);
  if (root.has("decoder")) read_decoder({root.value["decoder"], path + ": decoder"}, *data);
  if (root.has("post_processor"))
    read_post_processor({root.value["post_processor"], path + ": post_processor"}, *data);
  if (!data->prefix.empty()) data->bos = data->prefix[0];
  return data;
}

}  // namespace larosa
