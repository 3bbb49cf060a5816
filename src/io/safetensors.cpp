#include "io/safetensors.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kLongestHeader = 100'000'000;  // as the format's own library
constexpr size_t kMostDims = 8;

/// A tensor as its header declares it; its element type may be one we do not run.
struct Declared {
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // in the data section
  size_t file = 0;
};

int64_t stored_size(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {
      {"F64", 8}, {"F32", 4},  {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},     {"I16", 2},    {"I8", 1},
      {"U8", 1},  {"BOOL", 1}, {"U16", 2}, {"U32", 4},  {"U64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

std::optional<DType> known_dtype(const std::string& dtype) {
  if (dtype == "F32") return DType::f32;
  if (dtype == "F16") return DType::f16;
  if (dtype == "BF16") return DType::bf16;
  if (dtype == "F64") return DType::f64;
  return std::nullopt;
}

Declared parse_tensor(const json& j, const std::string& where) {
  if (!j.is_object()) fail(where, ": is not an object");
  const auto field = [&](const char* name) -> const json& {
    const auto it = j.find(name);
    if (it == j.end()) fail(where, ": ", name, " is missing");
    return *it;
  };
  const auto whole = [&](const json& value, const char* name) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t{1} << 62)
      fail(where, ": ", name, " holds ", value.dump(), ", expected a whole number");
    return value.get<int64_t>();
  };
  Declared t;
  if (!field("dtype").is_string()) fail(where, ": dtype is not a string");
  t.dtype = field("dtype").get<std::string>();
  const int64_t size = stored_size(t.dtype);
  if (size == 0) fail(where, ": dtype ", t.dtype, " is unknown");
  const json& shape = field("shape");
  if (!shape.is_array() || shape.size() > kMostDims)
    fail(where, ": shape is not a list of at most ", kMostDims, " numbers");
  int64_t bytes = size;
  for (const json& n : shape) {
    t.shape.push_back(whole(n, "shape"));
    bytes = checked_mul(bytes, t.shape.back(), where + ": shape");
  }
  const json& offsets = field("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2) fail(where, ": data_offsets is not a pair");
  t.begin = whole(offsets[0], "data_offsets");
  t.end = whole(offsets[1], "data_offsets");
  if (t.end < t.begin || t.end - t.begin != bytes) {
    fail(where, ": data_offsets hold ", t.end - t.begin, " bytes, shape ", shape_text(t.shape), " of ",
         t.dtype, " needs ", bytes);
  }
  return t;
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

struct Checkpoint::Data {
  std::string dir;
  std::vector<MappedFile> files;
  std::vector<int64_t> data_start;  // per file
  std::map<std::string, Declared> tensors;
  std::map<std::string, std::string> metadata;

  void add_file(const std::string& path);
  Tensor view(const std::string& name, const Declared& t) const;
};

void Checkpoint::Data::add_file(const std::string& path) {
  MappedFile file(path);
  if (file.size() < 8) fail(path, ": ", file.size(), " bytes, a safetensors file has at least 8");
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  if (length > static_cast<uint64_t>(kLongestHeader))
    fail(path, ": header length ", length, " is above ", kLongestHeader);
  const int64_t start = 8 + static_cast<int64_t>(length);
  if (start > file.size())
    fail(path, ": header length ", length, " is beyond the file's ", file.size(), " bytes");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, length);
  if (text.empty() || text[0] != '{') fail(path, ": header does not start with {");
  const json header = parse_json(text, path + ": header");
  std::vector<std::pair<int64_t, std::pair<int64_t, std::string>>> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) fail(path, ": header: __metadata__ is not an object");
      for (const auto& [key, entry] : value.items()) {
        if (!entry.is_string()) fail(path, ": header: __metadata__ ", key, " is not a string");
        metadata[key] = entry.get<std::string>();
      }
      continue;
    }
    Declared t = parse_tensor(value, path + ": tensor " + name);
    t.file = files.size();
    ranges.push_back({t.begin, {t.end, name}});
    if (!tensors.emplace(name, std::move(t)).second)
      fail(path, ": tensor ", name, ": stands in another file as well");
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t expected = 0;
  for (const auto& [begin, rest] : ranges) {
    if (begin != expected) {
      fail(path, ": tensor ", rest.second, ": data_offsets begin at ", begin, ", expected ", expected,
           begin < expected ? " (overlap)" : " (gap)");
    }
    expected = rest.first;
  }
  if (start + expected != file.size()) {
    fail(path, ": ", file.size(), " bytes, the header describes ", start + expected,
         file.size() < start + expected ? " (truncated)" : "");
  }
  files.push_back(std::move(file));
  data_start.push_back(start);
}

Tensor Checkpoint::Data::view(const std::string& name, const Declared& t) const {
  const auto dtype = known_dtype(t.dtype);
  if (!dtype)
    fail(files[t.file].path(), ": tensor ", name, ": dtype ", t.dtype, " is not supported (F32, F16, BF16)");
  return {name, *dtype, t.shape, files[t.file].data() + data_start[t.file] + t.begin, t.end - t.begin};
}

Checkpoint::Checkpoint(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open_file(const std::string& path) {
  auto data = std::make_unique<Data>();
  data->dir = path;
  data->add_file(path);
  return Checkpoint(std::move(data));
}

Checkpoint Checkpoint::open(const std::string& dir) {
  const fs::path index_path = fs::path(dir) / "model.safetensors.index.json";
  const fs::path single = fs::path(dir) / "model.safetensors";
  if (!fs::exists(index_path)) {
    if (!fs::exists(single))
      fail(dir, ": neither model.safetensors nor model.safetensors.index.json is there");
    return open_file(single.string());
  }
  const std::string source = index_path.string();
  const json index = read_json(source);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object()) fail(source, ": weight_map is missing or not an object");
  auto data = std::make_unique<Data>();
  data->dir = dir;
  std::map<std::string, size_t> shards;
  for (const auto& [name, value] : map->items()) {
    if (!value.is_string()) fail(source, ": weight_map: ", name, " is not a string");
    const std::string shard = value.get<std::string>();
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string("/\\\0", 3)) != std::string::npos) {
      fail(source, ": weight_map: ", name, " names \"", shard, "\", expected a file of this directory");
    }
    if (!shards.count(shard)) {
      const fs::path path = fs::path(dir) / shard;
      if (!fs::exists(path))
        fail(path.string(), ": the shard that ", source, " names for ", name, " is absent");
      shards[shard] = data->files.size();
      data->add_file(path.string());
    }
    const auto tensor = data->tensors.find(name);
    if (tensor == data->tensors.end() || tensor->second.file != shards[shard]) {
      fail((fs::path(dir) / shard).string(), ": tensor ", name, ": absent, though ", source,
           " places it there");
    }
  }
  if (shards.empty()) fail(source, ": weight_map is empty");
  return Checkpoint(std::move(data));
}

std::optional<Tensor> Checkpoint::find(const std::string& name) const {
  const auto it = data_->tensors.find(name);
  if (it == data_->tensors.end()) return std::nullopt;
  return data_->view(name, it->second);
}

Tensor Checkpoint::get(const std::string& name, std::span<const int64_t> shape) const {
  const auto tensor = find(name);
  if (!tensor) fail(data_->dir, ": tensor ", name, " is absent");
  if (!std::equal(shape.begin(), shape.end(), tensor->shape.begin(), tensor->shape.end())) {
    fail(file_of(name), ": tensor ", name, ": shape ", shape_text(tensor->shape), ", expected ",
         shape_text(shape));
  }
  return *tensor;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& entry : data_->tensors) names.push_back(entry.first);
  return names;
}

const std::map<std::string, std::string>& Checkpoint::metadata() const {
  return data_->metadata;
}

std::string Checkpoint::file_of(const std::string& name) const {
  const auto it = data_->tensors.find(name);
  return it == data_->tensors.end() ? data_->dir : data_->files[it->second.file].path();
}

int64_t Checkpoint::bytes() const {
  int64_t total = 0;
  for (const auto& entry : data_->tensors) total += entry.second.end - entry.second.begin;
  return total;
}

void Checkpoint::release(const Tensor& tensor) const {
  for (const MappedFile& file : data_->files) {
    if (tensor.data >= file.data() && tensor.data < file.data() + file.size())
      file.release(tensor.data - file.data(), tensor.bytes);
  }
}

void Checkpoint::check_finite() const {
  for (const auto& [name, declared] : data_->tensors) {
    if (!known_dtype(declared.dtype)) continue;
    const Tensor tensor = data_->view(name, declared);
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      if (!std::isfinite(load_element(tensor.data, tensor.dtype, i)))
        fail(file_of(name), ": tensor ", name, ": element ", i, " is not finite");
    }
    release(tensor);
  }
}

std::string Checkpoint::fingerprint() const {
  constexpr int64_t kEnds = 4096, kPlaces = 64, kSample = 64;
  XXH3_state_t* state = XXH3_createState();
  CHECK(state);
  XXH3_64bits_reset(state);
  for (const auto& [name, t] : data_->tensors) {
    const std::string head = name + t.dtype + shape_text(t.shape);
    XXH3_64bits_update(state, head.data(), head.size());
    const std::byte* data = data_->files[t.file].data() + data_->data_start[t.file] + t.begin;
    const int64_t bytes = t.end - t.begin, end = std::min(kEnds, bytes);
    XXH3_64bits_update(state, data, static_cast<size_t>(end));
    XXH3_64bits_update(state, data + bytes - end, static_cast<size_t>(end));
    for (int64_t i = 0; i < kPlaces && bytes > 2 * kEnds; ++i)
      XXH3_64bits_update(state, data + (bytes - kSample) / kPlaces * i, kSample);
  }
  const uint64_t hash = XXH3_64bits_digest(state);
  XXH3_freeState(state);
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace larosa
