// Files that lie: every damage is one Error that names file and field, and nothing is read outside of a file.
#include "io/safetensors.h"

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <random>

#include "base/error.h"
#include "io/json.h"
#include "model_fixture.h"

namespace larosa {
namespace {

/// A safetensors file's bytes: header text and data.
std::string file_of(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + std::string(data_bytes, '\1');
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

void expect_words(const std::string& message, const std::vector<std::string>& words) {
  for (const std::string& word : words)
    EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks \"" << word << "\"";
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

class Safetensors : public testing::Test {
 protected:
  std::string open_message(const std::string& bytes) {
    write_bytes(dir_ / "m.safetensors", bytes);
    return message_of([&] { Checkpoint::open_file(dir_ / "m.safetensors"); });
  }
  void write_shard(const std::string& name, const std::string& tensor) {
    write_bytes(dir_ / name,
                file_of(R"({")" + tensor + R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  }
  std::string index_message(const std::string& weight_map) {
    write_bytes(dir_ / "model.safetensors.index.json", R"({"weight_map":)" + weight_map + "}");
    return message_of([&] { Checkpoint::open(dir_ / ""); });
  }
  TemporaryDir dir_;
};

struct BadHeader {
  const char* header;
  size_t data_bytes;
  std::vector<std::string> words;
};

TEST_F(Safetensors, RefusesDamagedHeaders) {
  const std::vector<BadHeader> cases = {
      {"[1]", 0, {"header", "'{'"}},
      {"", 0, {"header", "'{'"}},
      {"{\"a\":", 0, {"header", "malformed JSON"}},
      {"{\"\xff\":1}", 0, {"header", "malformed JSON"}},
      {R"({"a":1})", 0, {"tensor a", "expected an object"}},
      {R"({"a":{}})", 0, {"tensor a", "dtype", "absent"}},
      {R"({"a":{"dtype":7,"shape":[],"data_offsets":[0,4]}})", 4, {"tensor a", "dtype", "string"}},
      {R"({"a":{"dtype":"F33","shape":[],"data_offsets":[0,4]}})", 4, {"tensor a", "dtype", "F33"}},
      {R"({"a":{"dtype":"F32","shape":3,"data_offsets":[0,4]}})", 4, {"tensor a", "shape"}},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, {"tensor a", "shape", "-1"}},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, {"tensor a", "shape", "1.5"}},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})",
       4,
       {"tensor a", "shape"}},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", 4, {"tensor a", "shape"}},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})",
       4,
       {"tensor a", "shape", "overflows"}},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}})",
       4,
       {"tensor a", "shape", "overflows"}},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, {"tensor a", "data_offsets", "absent"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, {"tensor a", "data_offsets"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, {"tensor a", "data_offsets"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4, {"tensor a", "data_offsets", "-4"}},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, {"tensor a", "data_offsets"}},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})",
       4,
       {"tensor a", "data_offsets", "needs 8"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 8, {"data_offsets", "8 data bytes"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, {"tensor a", "data_offsets", "gap"}},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       12,
       {"tensor b", "data_offsets", "overlapping"}},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       4,
       {"header", "\"a\"", "twice"}},
      {R"({"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, {"tensor name", "unprintable"}},
      {R"({"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, {"tensor name", "empty"}},
      {R"({"__metadata__":{"a":1}})", 0, {"__metadata__", "\"a\"", "string"}},
      {R"({"__metadata__":[]})", 0, {"__metadata__", "object"}},
  };
  for (const BadHeader& bad : cases) {
    const std::string message = open_message(file_of(bad.header, bad.data_bytes));
    expect_words(message, {"m.safetensors"});
    expect_words(message, bad.words);
  }
}

TEST_F(Safetensors, RefusesDamagedFiles) {
  expect_words(open_message(""), {"m.safetensors", "header length"});
  expect_words(open_message("abc"), {"m.safetensors", "header length"});
  std::string file = file_of("{}", 0);
  file[0] = 3;
  expect_words(open_message(file), {"m.safetensors", "header length 3", "beyond"});
  const uint64_t huge = 100'000'001;
  std::memcpy(file.data(), &huge, sizeof(huge));
  expect_words(open_message(file), {"m.safetensors", "header length 100000001", "limit"});
  file.replace(0, 8, 8, '\xff');
  expect_words(open_message(file), {"m.safetensors", "header length", "limit"});
  const std::string deep = R"({"a":)" + std::string(5000, '[') + std::string(5000, ']') + "}";
  expect_words(open_message(file_of(deep, 0)), {"m.safetensors", "nested deeper"});
  expect_words(message_of([&] { Checkpoint::open_file(dir_ / "none"); }), {"none", "No such file"});
  expect_words(message_of([&] { Checkpoint::open_file(dir_ / ""); }), {"not a regular file"});
  expect_words(message_of([&] { Checkpoint::open(dir_ / ""); }), {"neither", "model.safetensors.index.json"});
}

TEST_F(Safetensors, RefusesDamagedIndexes) {
  write_shard("one", "a");
  write_shard("two", "b");
  const std::string index = "model.safetensors.index.json";
  EXPECT_EQ(index_message(R"({"a":"one","b":"two"})"), "");
  for (const char* name : {"../x", "/etc/passwd", "sub/one", "..", "a\\\\b", "", "a\\u0000b"})
    expect_words(index_message(R"({"a":")" + std::string(name) + "\"}"),
                 {index, "weight_map", "plain file name"});
  expect_words(index_message(R"({"a":"three"})"), {index, "weight_map", "three", "absent"});
  expect_words(index_message(R"({"a":1})"), {index, "weight_map", "file name"});
  expect_words(index_message("{}"), {index, "weight_map"});
  expect_words(index_message("[]"), {index, "weight_map"});
  expect_words(index_message(R"({"c":"one"})"), {"one", "tensor \"c\"", "absent"});
  expect_words(index_message(R"({"a":"two"})"), {"two", "tensor \"a\"", "absent"});
  write_shard("two", "a");
  expect_words(index_message(R"({"a":"one","b":"two"})"), {"two", "tensor a", "also in", "one"});
  write_bytes(dir_ / "two", "");
  expect_words(index_message(R"({"a":"one","b":"two"})"), {"two", "header length"});
  write_bytes(dir_ / index, "");
  expect_words(message_of([&] { Checkpoint::open(dir_ / ""); }), {index, "empty"});
}

TEST_F(Safetensors, RefusesWrongShapeTypeAndValues) {
  const std::string path = dir_ / "m.safetensors";
  const float values[] = {1, std::nanf(""), 2};
  {
    SafetensorsWriter writer(path, {{"a", DType::f32, {3}}}, {});
    writer.write("a", 0, values, sizeof(values));
    writer.finish();
  }
  const Checkpoint file = Checkpoint::open_file(path);
  const int64_t wrong[] = {2, 2};
  expect_words(message_of([&] { file.get("a", wrong); }), {path, "tensor a", "(3)", "(2, 2)"});
  expect_words(message_of([&] { file.get("b", wrong); }), {path, "tensor b", "absent"});
  expect_words(message_of([&] { file.check_finite(); }), {path, "tensor a", "element 1", "nan"});
  write_bytes(path, file_of(R"({"i":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}})", 4));
  const Checkpoint integers = Checkpoint::open_file(path);
  expect_words(message_of([&] { integers.find("i"); }), {path, "tensor i", "dtype I32"});
}

TEST_F(Safetensors, WriterAndReaderAgree) {
  const std::string path = dir_ / "m.safetensors";
  const std::vector<uint16_t> half = {0x3f80, 0x4000, 0x4040};
  const std::vector<double> wide = {1.5, -2};
  {
    SafetensorsWriter writer(path, {{"h", DType::bf16, {1, 3}}, {"w", DType::f64, {2}}}, {{"key", "\"v\""}});
    writer.write("w", 8, &wide[1], 8);
    writer.write("h", 0, half.data(), 6);
    writer.write("w", 0, &wide[0], 8);
    writer.finish();
  }
  const Checkpoint file = Checkpoint::open_file(path);
  EXPECT_EQ(file.names(), (std::vector<std::string>{"h", "w"}));
  EXPECT_EQ(file.metadata().at("key"), "\"v\"");
  EXPECT_EQ(file.bytes(), 22);
  const Tensor h = *file.find("h"), w = *file.find("w");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(h.data) % 64, 0u);
  EXPECT_EQ(load_element(h.data, h.dtype, 2), 3.0f);
  EXPECT_EQ(load_element(w.data, w.dtype, 1), -2.0f);  // six bytes on: unaligned
  EXPECT_EQ(file.fingerprint(), Checkpoint::open_file(path).fingerprint());
  EXPECT_EQ(file.fingerprint().size(), 16u);
  std::string bytes = file_bytes(path);
  bytes.back() ^= 1;
  write_bytes(dir_ / "other", bytes);
  EXPECT_NE(file.fingerprint(), Checkpoint::open_file(dir_ / "other").fingerprint());
}

TEST_F(Safetensors, UnfinishedFilesAreRemoved) {
  const std::string path = dir_ / "m.safetensors";
  { SafetensorsWriter writer(path, {{"a", DType::f32, {3}}}, {}); }
  EXPECT_FALSE(std::filesystem::exists(path));
  expect_words(message_of([&] { SafetensorsWriter(dir_ / "no/such", {}, {}); }),
               {"no/such", "cannot create"});
}

TEST_F(Safetensors, FullDiskIsAnError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "this system has no /dev/full";
  expect_words(message_of([&] { SafetensorsWriter("/dev/full", {}, {}); }), {"/dev/full", "No space left"});
  EXPECT_TRUE(std::filesystem::exists("/dev/full"));
}

/// A limit on file sizes stands in for a disk that fills up after the header was written.
TEST_F(Safetensors, FullDiskLeavesNothingBehind) {
  const std::string path = dir_ / "m.safetensors";
  const std::vector<float> values(1 << 16, 1.0f);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{1 << 16, before.rlim_max};
  std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = message_of([&] {
    SafetensorsWriter writer(path, {{"a", DType::f32, {1 << 16}}}, {});
    EXPECT_TRUE(std::filesystem::exists(path));
    writer.write("a", 0, values.data(), 4 << 16);
  });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  expect_words(message, {path, "cannot write", "File too large"});
  EXPECT_FALSE(std::filesystem::exists(path));
}

/// Any bytes: loads or throws Error, nothing else.
TEST_F(Safetensors, RandomDamageIsHarmless) {
  const std::string valid =
      file_of(R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
              R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}})",
              22);
  std::mt19937 engine(1);
  const auto random = [&] { return static_cast<uint32_t>(engine()); };
  int loaded = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = valid;
    for (unsigned n = 1 + random() % 3; n > 0; --n) {
      const size_t place = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[place] = static_cast<char>(random());
          break;
        case 1:
          bytes[place] = "0123456789[]{},:\"-"[random() % 18];
          break;
        case 2:
          bytes.erase(place, 1 + random() % 4);
          break;
        default:
          bytes.insert(place, 1, bytes[random() % bytes.size()]);
      }
      if (bytes.empty()) bytes = "x";
    }
    write_bytes(dir_ / "m", bytes);
    try {
      const Checkpoint file = Checkpoint::open_file(dir_ / "m");
      for (const std::string& name : file.names()) file.find(name);
      file.check_finite();
      EXPECT_EQ(file.fingerprint().size(), 16u);
      ++loaded;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace larosa
