// The tokenizer against Hugging Face tokenizers in both directions, whole and streamed; and what damaged
// files do.
#include "text/tokenizer.h"

#include <cstring>
#include <iterator>
#include <random>
#include <sstream>

#include "base/error.h"
#include "io/json.h"
#include "model_fixture.h"
#include "text/unicode.h"

namespace larosa {
namespace {

using nlohmann::json;
using Ids = std::vector<TokenId>;

std::string streamed(const Tokenizer& tokenizer, const Ids& ids) {
  TextStream stream(tokenizer, false);
  std::string text;
  const auto add = [&](const std::string& part) {
    EXPECT_EQ(to_valid_utf8(part), part) << "a part splits a character";
    text += part;
  };
  for (TokenId id : ids) add(stream.push(id));
  add(stream.finish());
  return text;
}

/// Every case of a file that dev/tokenizer_golden.py wrote. Returns how many there are.
size_t compare(const std::string& path, const std::string& root) {
  size_t count = 0, wrong = 0;
  for (const json& golden : json::parse(file_bytes(path))) {
    const std::string dir = root + golden.at("dir").get<std::string>();
    const Tokenizer tokenizer = Tokenizer::load(dir);
    for (const json& one : golden.at("cases")) {
      const auto text = one.at("text").get<std::string>(), decoded = one.at("decoded").get<std::string>();
      const auto ids = one.at("ids").get<Ids>();
      const bool same = tokenizer.encode(text, false) == ids && tokenizer.decode(ids, false) == decoded &&
                        streamed(tokenizer, ids) == decoded;
      if (!same && ++wrong <= 10)
        ADD_FAILURE() << dir << ": " << json(text) << "\nids " << json(ids) << "\nnot "
                      << json(tokenizer.encode(text, false)) << "\ntext " << json(decoded) << "\nnot "
                      << json(tokenizer.decode(ids, false));
      ++count;
    }
  }
  EXPECT_EQ(wrong, 0u) << "of " << count;
  return count;
}

TEST(Tokenizer, DemoAgreesWithHuggingFace) {
  EXPECT_GT(compare(source_path("tests/golden/tokenizers/demo-7m.json"), source_path("")), 200u);
}

TEST(Tokenizer, SlicesAgreeWithHuggingFace) {
  const char* golden = std::getenv("LAROSA_TOKENIZER_GOLDEN");
  if (!golden)
    GTEST_SKIP() << "LAROSA_TOKENIZER_GOLDEN is not set: no slices of dev/tokenizer_golden.py are compared";
  EXPECT_GT(compare(golden, ""), 0u);
}

TEST(Tokenizer, PublishedVectors) {
  const char* data = std::getenv("LAROSA_TEST_DATA");
  if (!data) GTEST_SKIP() << "LAROSA_TEST_DATA is not set: the published vectors are not read";
  const std::string root = std::string(data) + "/tokenizers/", separator = "\n__ggml_vocab_test__\n";
  for (const auto& [name, dir] : std::vector<std::pair<std::string, std::string>>{
           {"llama-spm", "llama2"}, {"llama-bpe", "llama3"}, {"qwen2", "qwen2.5"}, {"gpt-2", "gpt2"}}) {
    const Tokenizer tokenizer = Tokenizer::load(root + dir);
    const std::string inputs = file_bytes(root + "vectors/ggml-vocab-" + name + ".gguf.inp");
    std::istringstream outputs(file_bytes(root + "vectors/ggml-vocab-" + name + ".gguf.out"));
    std::string line;
    size_t begin = 0, count = 0;
    for (size_t end = 0; (end = inputs.find(separator, begin)) != std::string::npos;
         begin = end + separator.size()) {
      ASSERT_TRUE(std::getline(outputs, line));
      std::istringstream numbers(line);
      const Ids expected{std::istream_iterator<TokenId>(numbers), {}};
      const std::string text = inputs.substr(begin, end - begin);
      EXPECT_EQ(tokenizer.encode(text, false), expected) << name << ": " << json(text);
      EXPECT_EQ(tokenizer.decode(expected, false), tokenizer.decode(tokenizer.encode(text, false), false));
      EXPECT_EQ(streamed(tokenizer, expected), text) << name;
      ++count;
    }
    EXPECT_GT(count, 40u) << name;
  }
}

TEST(Tokenizer, IdsAndSpecialTokens) {
  const Tokenizer tokenizer = Tokenizer::load(demo_model());
  const TokenId bos = tokenizer.find("<|begin_of_text|>");
  EXPECT_EQ(tokenizer.bos(), bos);
  EXPECT_EQ(tokenizer.find("no such token"), -1);
  const Ids ids = tokenizer.encode("a<|begin_of_text|>b", false);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), bos), 1);
  const Ids plain = tokenizer.encode("a<|begin_of_text|>b", false, false);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), bos), 0);
  EXPECT_EQ(tokenizer.decode(plain, true), "a<|begin_of_text|>b");
  EXPECT_EQ(tokenizer.decode(ids, true), "ab");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xff\xe2\x82", false), true), "a\xef\xbf\xbd\xef\xbf\xbd");
  for (int64_t id : {int64_t{-1}, tokenizer.size()}) {
    try {
      tokenizer.decode(Ids{static_cast<TokenId>(id)}, false);
      ADD_FAILURE() << id << " was decoded";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("id " + std::to_string(id)), std::string::npos) << e.what();
    }
  }
}

/// Any ids at all: parts are whole characters and join to the decoded text.
TEST(Tokenizer, StreamOfRandomIds) {
  const Tokenizer tokenizer = Tokenizer::load(demo_model());
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    const Ids ids = some_tokens(seed % 2 ? 256 : tokenizer.size(), 40, seed);
    EXPECT_EQ(streamed(tokenizer, ids), tokenizer.decode(ids, false));
  }
}

class TokenizerFiles : public testing::Test {
 protected:
  void write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name, std::ios::binary) << text;
  }
  std::string message() {
    try {
      Tokenizer::load(dir_ / "");
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }
  void expect_message(const std::vector<std::string>& words, const std::string& of = "") {
    const std::string found = message();
    for (const std::string& word : words)
      EXPECT_NE(found.find(word), std::string::npos)
          << of << ": \"" << found << "\" lacks \"" << word << "\"";
  }
  TemporaryDir dir_;
};

json small_tokenizer() {
  return json::parse(R"({"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"▁":3},"merges":["a b"]},
      "added_tokens":[{"id":4,"content":"<s>","special":true}],"normalizer":null,"pre_tokenizer":null,
      "post_processor":null,"decoder":null})");
}

struct Mutation {
  const char* pointer;
  const char* value;
  std::vector<std::string> words;
};

TEST_F(TokenizerFiles, MalformedTokenizerJson) {
  const std::vector<Mutation> cases = {
      {"/model", "null", {"model", "missing"}},
      {"/model/type", R"("Unigram")", {"model", "Unigram"}},
      {"/model/type", "7", {"model.type", "string"}},
      {"/model/vocab", "null", {"model", "vocab", "missing"}},
      {"/model/vocab", "[]", {"model.vocab", "object"}},
      {"/model/vocab", "{}", {"model.vocab", "object"}},
      {"/model/vocab/b", "0", {"model.vocab", "id 0", "twice"}},
      {"/model/vocab/b", "-1", {"model.vocab", "\"b\"", "-1"}},
      {"/model/vocab/b", "1.5", {"model.vocab", "\"b\"", "1.5"}},
      {"/model/vocab/b", R"("1")", {"model.vocab", "\"b\""}},
      {"/model/vocab/b", "4194304", {"model.vocab", "\"b\"", "4194304"}},
      {"/model/vocab/b", "18446744073709551615", {"model.vocab", "\"b\""}},
      {"/model/merges", "null", {"model", "merges", "missing"}},
      {"/model/merges", "7", {"model.merges", "list"}},
      {"/model/merges/0", R"("ab")", {"model.merges[0]", "two pieces"}},
      {"/model/merges/0", R"(["a"])", {"model.merges[0]", "two pieces"}},
      {"/model/merges/0", R"(["a",1])", {"model.merges[0]", "two pieces"}},
      {"/model/merges/0", R"("a x")", {"model.merges", "\"x\"", "vocabulary"}},
      {"/model/merges/0", R"("b a")", {"model.merges", "\"ba\"", "vocabulary"}},
      {"/model/dropout", "0.1", {"model.dropout"}},
      {"/model/unk_token", R"("?")", {"model.unk_token"}},
      {"/model/byte_fallback", "true", {"model.byte_fallback", "0x00"}},
      {"/model/byte_fallback", "1", {"model.byte_fallback", "true or false"}},
      {"/model/continuing_subword_prefix", R"("##")", {"model.continuing_subword_prefix"}},
      {"/added_tokens", "{}", {"added_tokens", "list"}},
      {"/added_tokens/0/id", "-4", {"added_tokens[0].id", "-4"}},
      {"/added_tokens/0/id", "1", {"added_tokens[0]", "id 1", "another"}},
      {"/added_tokens/0/id", "null", {"added_tokens[0]", "id", "missing"}},
      {"/added_tokens/0/content", R"("")", {"added_tokens[0]", "content"}},
      {"/added_tokens/0/content", R"("a")", {"added_tokens[0]", "id of \"a\""}},
      {"/added_tokens/1", R"({"id":5,"content":"<s>"})", {"added_tokens[1]", "<s>"}},
      {"/added_tokens/1", R"({"id":4,"content":"<s>"})", {"added_tokens[1]", "twice"}},
      {"/added_tokens/1", R"({"id":4,"content":"<t>"})", {"added_tokens[1]", "id 4", "another"}},
      {"/normalizer", R"({"type":"Nmt"})", {"normalizer", "Nmt"}},
      {"/normalizer",
       R"({"type":"Replace","pattern":{"Regex":"("},"content":""})",
       {"normalizer.pattern", "byte"}},
      {"/pre_tokenizer",
       R"({"type":"Split","pattern":{"Regex":"["},"behavior":"Isolated"})",
       {"pre_tokenizer.pattern"}},
      {"/pre_tokenizer",
       R"({"type":"Split","pattern":{"String":"a"},"behavior":"x"})",
       {"pre_tokenizer.behavior"}},
      {"/pre_tokenizer",
       R"({"type":"Sequence","pretokenizers":[{}]})",
       {"pre_tokenizer.pretokenizers[0]", "type"}},
      {"/post_processor", R"({"type":"BertProcessing"})", {"post_processor", "BertProcessing"}},
      {"/post_processor",
       R"({"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<x>"}}]})",
       {"post_processor.single[0]", "<x>"}},
      {"/decoder", R"({"type":"WordPiece"})", {"decoder", "WordPiece"}},
      {"/decoder", R"({"type":"Strip","content":" ","start":-1,"stop":0})", {"decoder.start", "-1"}},
  };
  write("tokenizer.json", small_tokenizer().dump());
  ASSERT_EQ(message(), "");
  for (const Mutation& bad : cases) {
    json tokenizer = small_tokenizer();
    tokenizer[json::json_pointer(bad.pointer)] = json::parse(bad.value);
    write("tokenizer.json", tokenizer.dump());
    expect_message({"tokenizer.json"}, bad.pointer);
    expect_message(bad.words, std::string(bad.pointer) + " " + bad.value);
  }
}

TEST_F(TokenizerFiles, DamagedFiles) {
  expect_message({"no tokenizer.json"});
  write("tokenizer.json", "");
  expect_message({"tokenizer.json", "empty"});
  write("tokenizer.json", std::string(100000, '['));
  expect_message({"tokenizer.json", "nested deeper"});
  const std::string valid = file_bytes(demo_model() + "/tokenizer.json");
  for (size_t part = 0; part < 8; ++part) {
    write("tokenizer.json", valid.substr(0, valid.size() * part / 8));
    expect_message({"tokenizer.json"}, "truncated");
  }
  std::filesystem::remove(dir_ / "tokenizer.json");
  write("tokenizer.model", "");
  expect_message({"tokenizer.model"});
  for (const char* ranks : {"YQ==", "YQ== 1\n", "?! 0\n", "YQ== 0\nYQ== 1\n", "YQ== 0\n"}) {
    write("tokenizer.model", ranks);
    expect_message({"tokenizer.model"}, ranks);
    EXPECT_NE(message(), "") << ranks;
  }
  write("tokenizer.model", "\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
  expect_message({"tokenizer.model", "protobuf"});
  std::filesystem::remove(dir_ / "tokenizer.model");
  write("vocab.json", R"({"a":0,"b":1})");
  write("merges.txt", "#version: 0.2\na b\n");
  expect_message({"merges.txt", "merge 0", "\"ab\""});
  write("vocab.json", "[1]");
  expect_message({"vocab.json", "object"});
}

/// Flipped bytes: a tokenizer that works, or an Error naming the file.
TEST_F(TokenizerFiles, RandomDamageIsHarmless) {
  const std::string demo = file_bytes(demo_model() + "/tokenizer.json"), small = small_tokenizer().dump();
  std::mt19937 engine(1);
  int loaded = 0, refused = 0;
  for (int round = 0; round < 1200; ++round) {
    std::string text = round % 4 == 0 ? demo : small;
    const char flipped[] = {static_cast<char>(engine()), "0123456789abcdeftrunls"[engine() % 22]};
    text[engine() % text.size()] = flipped[engine() % 2];
    write("tokenizer.json", text);
    try {
      const Tokenizer tokenizer = Tokenizer::load(dir_ / "");
      const Ids ids = tokenizer.encode("The quick  brown fox<|begin_of_text|>é👍\n ab<s>", true);
      EXPECT_EQ(streamed(tokenizer, ids), tokenizer.decode(ids, false));
      ++loaded;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("tokenizer.json"), std::string::npos) << e.what();
      ++refused;
    }
  }
  EXPECT_GT(loaded, 50);
  EXPECT_GT(refused, 300);
}

std::string field(int number, const std::string& bytes) {
  return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
}
std::string number_field(int number, int value) {
  return {static_cast<char>(number << 3), static_cast<char>(value)};
}
std::string piece(const std::string& text, float score, int type) {
  std::string bytes(4, '\0');
  std::memcpy(bytes.data(), &score, 4);
  return field(1, field(1, text) + std::string(1, 2 << 3 | 5) + bytes + number_field(3, type));
}
std::string small_sentencepiece(int model_type = 2) {
  return piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3) + piece("▁a", -1, 1) +
         piece("▁", -2, 1) + piece("a", -3, 1) + piece("aa", -4, 1) + piece("<u>", 0, 4) +
         field(2, number_field(3, model_type)) + field(3, number_field(3, 1) + number_field(4, 1));
}

TEST_F(TokenizerFiles, SentencePiece) {
  write("tokenizer.model", small_sentencepiece());
  Tokenizer tokenizer = Tokenizer::load(dir_ / "");
  EXPECT_EQ(tokenizer.encode("aaa  a", true), (Ids{1, 3, 6, 4, 3}));  // blanks are kept
  EXPECT_EQ(tokenizer.encode("xyz", false), (Ids{4, 0}));
  EXPECT_EQ(tokenizer.encode("<u>", false), (Ids{7}));
  EXPECT_EQ(tokenizer.decode(Ids{1, 3, 6, 4, 3}, true), "aaa  a");
  EXPECT_EQ(tokenizer.find("▁a"), 3);
  EXPECT_EQ(tokenizer.find("<s>"), 1);
  write("tokenizer_config.json", R"({"add_bos_token":false,"add_eos_token":true})");
  EXPECT_EQ(Tokenizer::load(dir_ / "").encode("a", true), (Ids{3, 2}));
  write("tokenizer_config.json", R"({"add_bos_token":"yes"})");
  expect_message({"tokenizer_config.json", "add_bos_token"});
  std::filesystem::remove(dir_ / "tokenizer_config.json");
  write("tokenizer.model", small_sentencepiece(1));
  expect_message({"tokenizer.model", "trainer_spec.model_type is 1"});
  write("tokenizer.model", small_sentencepiece() + piece("a", 0, 1));
  expect_message({"tokenizer.model", "pieces", "\"a\"", "twice"});
  write("tokenizer.model", small_sentencepiece() + piece("<0x00>", 0, 6));
  expect_message({"tokenizer.model", "pieces", "0xFF"});
  write("tokenizer.model", small_sentencepiece() + piece("c", 0, 9));
  expect_message({"tokenizer.model", "pieces[8].type", "9"});
  const std::string valid = small_sentencepiece();
  std::mt19937 engine(1);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = valid;
    bytes[1 + engine() % (bytes.size() - 1)] = static_cast<char>(engine());
    if (round % 3 == 0) bytes.resize(1 + engine() % bytes.size());
    write("tokenizer.model", bytes);
    try {
      const Tokenizer damaged = Tokenizer::load(dir_ / "");
      EXPECT_EQ(streamed(damaged, damaged.encode("a aa<s>", true)),
                damaged.decode(damaged.encode("a aa<s>", true), false));
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("tokenizer.model"), std::string::npos) << e.what();
    }
  }
}

/// The names of a release replace the numbered reserved tokens of the ranks.
TEST_F(TokenizerFiles, RanksWithNamedTokens) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string ranks;
  for (size_t b = 0; b < 256; ++b)
    ranks += std::string{digits[b >> 2], digits[(b & 3) << 4]} + "== " + std::to_string(b) + "\n";
  write("tokenizer.model", ranks);
  Tokenizer tokenizer = Tokenizer::load(dir_ / "");
  EXPECT_EQ(tokenizer.find("<|reserved_special_token_2|>"), 260);
  EXPECT_EQ(tokenizer.size(), 512);
  write("tokenizer_config.json", R"({"eos_token":"<|eot|>","added_tokens_decoder":{
      "260":{"content":"<|pad|>","special":true},"261":{"content":"<|reserved_special_token_2|>","special":true},
      "264":{"content":"<|eot|>","special":true}}})");
  tokenizer = Tokenizer::load(dir_ / "");
  EXPECT_EQ(tokenizer.find("<|pad|>"), 260);
  EXPECT_EQ(tokenizer.find("<|reserved_special_token_2|>"), 261);
  EXPECT_EQ(tokenizer.find("<|reserved_special_token_3|>"), -1);
  EXPECT_EQ(tokenizer.eos(), 264);
  EXPECT_EQ(tokenizer.bos(), 256);
  EXPECT_EQ(tokenizer.encode("a<|pad|>", true), (Ids{256, 97, 260}));
  write("tokenizer_config.json", R"({"added_tokens_decoder":{"97":{"content":"<|x|>"}}})");
  expect_message({"tokenizer_config.json", "added_tokens_decoder.97", "another"});
  write("tokenizer_config.json", R"({"added_tokens_decoder":{"x":{"content":"<|x|>"}}})");
  expect_message({"tokenizer_config.json", "added_tokens_decoder", "\"x\""});
}

/// Ids as Hugging Face tokenizers 0.23 gives them.
TEST_F(TokenizerFiles, AddedTokensAndNormalizers) {
  json tokenizer = small_tokenizer();
  json& token = tokenizer["added_tokens"][0];
  const auto ids = [&](const std::string& text) {
    write("tokenizer.json", tokenizer.dump());
    return Tokenizer::load(dir_ / "").encode(text, false);
  };
  token["lstrip"] = token["rstrip"] = true;
  EXPECT_EQ(ids("a\u00a0\u3000<s>\u2003b"), (Ids{0, 4, 1}));
  token["lstrip"] = token["rstrip"] = false;
  token["single_word"] = true;
  token["content"] = "b";
  token["id"] = 1;
  EXPECT_EQ(ids("ab"), (Ids{2}));
  token["content"] = "<s>";
  token["id"] = 4;
  EXPECT_EQ(ids("a<s>\u3002"), (Ids{0}));
  EXPECT_EQ(ids("\u3002<s>\u3002"), (Ids{4}));
  EXPECT_EQ(ids("\u00e9<s>"), (Ids{}));
  tokenizer["normalizer"] = json::parse(R"({"type":"Replace","pattern":{"Regex":"x+"},"content":"ab"})");
  EXPECT_EQ(ids("axxxb"), (Ids{0, 2, 1}));
  tokenizer["normalizer"] = json::parse(R"({"type":"Strip","strip_left":true,"strip_right":false})");
  tokenizer["model"]["vocab"][" "] = 5;
  EXPECT_EQ(ids(" \u3000a "), (Ids{0, 5}));
}

}  // namespace
}  // namespace larosa
