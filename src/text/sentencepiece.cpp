// SentencePiece models, read as Hugging Face converts them: byte-pair merges in the order of the scores,
// blanks kept whatever the model's own normaliser does with them.
#include <algorithm>
#include <bit>
#include <fstream>
#include <iterator>
#include <tuple>

#include "base/error.h"
#include "text/pipeline.h"
#include "text/unicode.h"

namespace larosa {
namespace {

/// The fields of one protobuf message, one after another.
class Message {
 public:
  Message(std::string_view message, std::string where) : rest_(message), where_(std::move(where)) {}

  uint64_t number = 0, value = 0;  // of the field; value: of a varint or of 32 or 64 fixed bits
  std::string_view bytes;          // of a string, bytes or a message

  bool next() {
    if (rest_.empty()) return false;
    const uint64_t key = varint();
    number = key >> 3;
    value = 0;
    bytes = {};
    switch (key & 7) {
      case 0:
        value = varint();
        break;
      case 1:
        value = fixed(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        value = fixed(4);
        break;
      default:
        fail(where_, ": malformed protobuf: wire type ", key & 7);
    }
    return true;
  }

 private:
  std::string_view take(uint64_t count) {
    if (count > rest_.size()) fail(where_, ": malformed protobuf: ends within a field");
    const std::string_view part = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return part;
  }
  uint64_t fixed(size_t count) {
    uint64_t bits = 0;
    const std::string_view part = take(count);
    for (size_t i = 0; i < count; ++i) bits |= uint64_t{static_cast<uint8_t>(part[i])} << (8 * i);
    return bits;
  }
  uint64_t varint() {
    uint64_t bits = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1)[0]);
      bits |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return bits;
    }
    fail(where_, ": malformed protobuf: number of more than 64 bits");
  }

  std::string_view rest_;
  std::string where_;
};

enum Type : uint64_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused, kByte };

struct ScoredPiece {
  std::string text;
  float score = 0;
  uint64_t type = kNormal;
};

struct Model {
  std::vector<ScoredPiece> pieces;
  uint64_t model_type = 1;
  int64_t bos = 1, eos = 2;
  bool dummy_prefix = true;
};

/// Field numbers of sentencepiece_model.proto.
Model read_model(std::string_view bytes, const std::string& path) {
  Model model;
  for (Message message(bytes, path); message.next();) {
    if (message.number == 1) {
      if (static_cast<int64_t>(model.pieces.size()) >= kMostTokens)
        fail(path, ": more than ", kMostTokens, " pieces");
      ScoredPiece& piece = model.pieces.emplace_back();
      const std::string where = path + ": pieces[" + std::to_string(model.pieces.size() - 1) + "]";
      for (Message field(message.bytes, where); field.next();) {
        if (field.number == 1) piece.text = field.bytes;
        if (field.number == 2) piece.score = std::bit_cast<float>(static_cast<uint32_t>(field.value));
        if (field.number == 3) piece.type = field.value;
      }
      if (piece.text.empty()) fail(where, ".piece: is empty");
      if (piece.type < kNormal || piece.type > kByte)
        fail(where, ".type: is ", piece.type, ", expected 1 to 6");
      if (!(piece.score == piece.score)) fail(where, ".score: is not a number");
    } else if (message.number == 2) {
      for (Message field(message.bytes, path + ": trainer_spec"); field.next();) {
        if (field.number == 3) model.model_type = field.value;
        if (field.number == 41) model.bos = static_cast<int32_t>(field.value);
        if (field.number == 42) model.eos = static_cast<int32_t>(field.value);
      }
    } else if (message.number == 3) {
      for (Message field(message.bytes, path + ": normalizer_spec"); field.next();) {
        if (field.number == 3) model.dummy_prefix = field.value != 0;
      }
    }
  }
  return model;
}

/// All pairs of pieces that make a piece, the best score first; among equals in Hugging Face's order.
void add_merges(const Model& model, Bpe& bpe) {
  struct Pair {
    float score;
    size_t left_length, right_length;  // in characters
    TokenId left, right, joined;
  };
  std::vector<Pair> pairs;
  const auto characters = [](std::string_view text) {
    return static_cast<size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
  };
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    const ScoredPiece& piece = model.pieces[id];
    if (piece.type != kNormal) continue;  // text never merges into a control token
    const std::string_view text = piece.text;
    for (size_t cut = 1; cut < text.size(); ++cut) {
      const auto left = bpe.vocab.find(text.substr(0, cut));
      if (left == bpe.vocab.end()) continue;
      const auto right = bpe.vocab.find(text.substr(cut));
      if (right == bpe.vocab.end()) continue;
      pairs.push_back({piece.score, characters(left->first), characters(right->first), left->second,
                       right->second, static_cast<TokenId>(id)});
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    return std::tie(b.score, b.left_length, b.right_length) <
           std::tie(a.score, a.left_length, a.right_length);
  });
  bpe.merges.reserve(pairs.size());
  int32_t rank = 0;
  for (const Pair& pair : pairs)
    bpe.merges[static_cast<uint64_t>(pair.left) << 32 | static_cast<uint32_t>(pair.right)] = {rank++,
                                                                                              pair.joined};
}

}  // namespace

std::unique_ptr<Tokenizer::Data> load_sentencepiece(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, ": cannot be opened");
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const Model model = read_model(bytes, path);
  if (model.model_type != 2)
    fail(path, ": trainer_spec.model_type is ", model.model_type, ", only 2 (BPE) is supported");
  if (model.pieces.empty()) fail(path, ": pieces: holds no pieces");

  auto data = std::make_unique<Tokenizer::Data>();
  data->source = path;
  data->bpe.vocab.reserve(model.pieces.size());
  data->pieces.reserve(model.pieces.size());
  std::vector<TokenId> byte_ids(256, -1);
  size_t bytes_named = 0;
  for (size_t index = 0; index < model.pieces.size(); ++index) {
    const auto& [text, score, type] = model.pieces[index];
    const auto id = static_cast<TokenId>(index);
    add_piece(*data, text, id, path + ": pieces");
    Piece& piece = data->pieces[index];
    if (type == kByte) {
      const auto byte = byte_token(text);
      if (!byte) fail(path, ": pieces[", index, "]: \"", text, "\" is not <0x00> to <0xFF>");
      bytes_named += byte_ids[*byte] < 0;
      byte_ids[*byte] = id;
      piece = {Piece::Kind::byte, std::string(1, static_cast<char>(*byte)), false};
    } else if (type == kNormal || type == kUnused) {
      for (size_t at = 0; (at = piece.bytes.find(kBlank, at)) != std::string::npos;)
        piece.bytes.replace(at, kBlank.size(), " ");
    } else {
      if (type == kUnknown) data->bpe.unknown = id;
      data->add({text, id, type != kUserDefined, false, false, false, false},
                path + ": pieces[" + std::to_string(index) + "]");
    }
  }
  if (bytes_named == 256)
    data->bpe.byte_ids = std::move(byte_ids);
  else if (bytes_named > 0)
    fail(path, ": pieces: lacks some of <0x00> to <0xFF>");
  data->bpe.fuse_unknown = true;
  add_merges(model, data->bpe);

  data->normalizers = {[dummy_prefix = model.dummy_prefix](std::string text) {
    std::string result;
    if (dummy_prefix && !text.empty()) result = kBlank;
    for (char c : text) c == ' ' ? result.append(kBlank) : result.append(1, c);
    return result;
  }};
  data->strip_left = model.dummy_prefix ? 1 : 0;
  const auto there = [&](int64_t id) {
    return id >= 0 && id < static_cast<int64_t>(model.pieces.size()) &&
           model.pieces[static_cast<size_t>(id)].type == kControl;
  };
  if (there(model.bos)) data->bos = static_cast<TokenId>(model.bos);
  if (there(model.eos)) data->eos = static_cast<TokenId>(model.eos);
  data->config_adds = true;
  return data;
}

}  // namespace larosa
