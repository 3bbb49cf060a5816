// Text to token ids and back, exactly as Hugging Face tokenizers does it for the model families we run.
// Everything model-specific is read from the tokenizer files; nothing here asks for a model's name.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace larosa {

using TokenId = int32_t;

class Tokenizer {
 public:
  /// Reads `dir`/tokenizer.json, else tokenizer.model (SentencePiece protobuf, or tiktoken ranks as Llama 3
  /// ships), else vocab.json + merges.txt (or encoder.json + vocab.bpe). bos/eos and added tokens come from
  /// these files, tokenizer_config.json and special_tokens_map.json.
  /// Throws Error naming file and field for anything malformed or of a kind that is not implemented.
  static Tokenizer load(const std::string& dir);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Ids of `text` (UTF-8; invalid bytes become U+FFFD as in Python's errors="replace").
  /// add_special: what the post-processor adds (a BOS for Llama, nothing for Qwen).
  /// parse_special: added/special tokens written in the text become their single ids (Hugging Face's
  /// default).
  std::vector<TokenId> encode(std::string_view text, bool add_special, bool parse_special = true) const;

  /// Text of `ids`; skip_special leaves out special tokens. Bytes that form no valid UTF-8 become U+FFFD.
  /// Throws Error for an id outside [0, size()).
  std::string decode(std::span<const TokenId> ids, bool skip_special) const;

  /// Number of ids: the largest id + 1, added tokens included.
  int64_t size() const;
  /// The token that starts a document, or -1 where the files name none.
  TokenId bos() const;
  /// The token that ends a document, or -1.
  TokenId eos() const;
  /// The id of a token by its exact content ("<|eot_id|>"), or -1.
  TokenId find(std::string_view content) const;
  /// True when encode(…, add_special = true) puts something before or after the text.
  bool adds_special() const;

  struct Data;  // text/pipeline.h

 private:
  friend class TextStream;
  explicit Tokenizer(std::unique_ptr<const Data> data);
  std::unique_ptr<const Data> data_;
};

/// Decodes token by token for streaming: what `push` returns is always whole UTF-8 characters, and all pieces
/// plus `finish()` joined equal Tokenizer::decode of all the ids.
class TextStream {
 public:
  /// The tokenizer must outlive the stream. Special tokens are left out when skip_special is set.
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special = true);
  /// The text that has become certain with this token; may be empty.
  std::string push(TokenId id);
  /// What is still held back at the end (an incomplete character becomes U+FFFD).
  std::string finish();

 private:
  std::string end_of_bytes();
  std::string stripped(std::string text);

  const Tokenizer* tokenizer_;
  bool skip_special_;
  size_t strip_;         // blanks still to take from the start of the text
  std::string pending_;  // the start of a character
  std::string bytes_;    // a run of byte-fallback tokens
};

}  // namespace larosa
