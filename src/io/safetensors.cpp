#include "io/safetensors.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <sstream>

#include "base/error.h"
#include "io/json.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kMaxHeader = 100'000'000;  // bytes; the format's own limit
constexpr size_t kMaxDims = 8;

/// A tensor as the header describes it. `dtype` is the stored word; only four of them can be computed with.
struct Entry {
  size_t file = 0;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // in the file
  int64_t bytes = 0;
};

struct StoredType {
  const char* name;
  int64_t size;
  std::optional<DType> dtype;
};
constexpr StoredType kStoredTypes[] = {
    {"F64", 8, DType::f64}, {"F32", 4, DType::f32}, {"F16", 2, DType::f16}, {"BF16", 2, DType::bf16},
    {"I64", 8, {}},         {"I32", 4, {}},         {"I16", 2, {}},         {"I8", 1, {}},
    {"U64", 8, {}},         {"U32", 4, {}},         {"U16", 2, {}},         {"U8", 1, {}},
    {"BOOL", 1, {}},        {"F8_E4M3", 1, {}},     {"F8_E5M2", 1, {}},     {"F8_E8M0", 1, {}},
    {"C64", 8, {}},         {"F8_E4M3FNUZ", 1, {}}, {"F8_E5M2FNUZ", 1, {}},
};

const StoredType* find_stored_type(const std::string& name) {
  for (const StoredType& type : kStoredTypes)
    if (name == type.name) return &type;
  return nullptr;
}

/// A name that can stand in a one-line message.
bool printable(const std::string& text) {
  return !text.empty() && text.size() <= 1024 &&
         std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

/// One tensor's header entry; `limit` is the number of data bytes in the file.
Entry read_entry(const std::string& where, const json& value, int64_t limit) {
  const Fields fields(value, where);
  Entry entry;
  entry.dtype = fields.text("dtype");
  const json& shape = fields.get("shape");
  if (!shape.is_array() || shape.size() > kMaxDims)
    fields.refuse("shape", "expected a list of at most " + std::to_string(kMaxDims) + " sizes");
  int64_t elements = 1;
  for (const json& d : shape) {
    const auto size = integer_in(d, 0, std::numeric_limits<int64_t>::max());
    if (!size) fields.refuse("shape", "expected sizes from 0 to 2^63 - 1");
    entry.shape.push_back(*size);
    elements = checked_mul(elements, *size, where + ": shape " + shown(shape));
  }
  const json& offsets = fields.get("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2) fields.refuse("data_offsets", "expected [begin, end]");
  const auto begin = integer_in(offsets[0], 0, limit), end = integer_in(offsets[1], 0, limit);
  if (!begin || !end || *begin > *end) {
    fields.refuse("data_offsets",
                  "expected begin and end within the file's " + std::to_string(limit) + " data bytes");
  }
  entry.offset = *begin;
  entry.bytes = *end - *begin;
  const StoredType* type = find_stored_type(entry.dtype);
  if (!type) fields.refuse("dtype", "expected a type of the safetensors format");
  const int64_t needed = checked_mul(elements, type->size, where + ": shape " + shown(shape));
  if (needed != entry.bytes) {
    fail(where, ": data_offsets span ", entry.bytes, " bytes, but shape ", shape_text(entry.shape), " of ",
         entry.dtype, " needs ", needed);
  }
  return entry;
}

/// Every data byte belongs to exactly one tensor.
void check_coverage(const std::string& path, const std::map<std::string, Entry>& entries, int64_t limit) {
  std::vector<std::pair<const std::string*, const Entry*>> order;
  for (const auto& [name, entry] : entries) order.emplace_back(&name, &entry);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->offset, a.second->bytes) < std::pair(b.second->offset, b.second->bytes);
  });
  int64_t end = 0;
  for (const auto& [name, entry] : order) {
    if (entry->offset != end) {
      fail(path, ": tensor ", *name, ": data_offsets begin at ", entry->offset, ", ",
           entry->offset < end ? "overlapping the tensor before it"
                               : "leaving a gap after the tensor before it",
           ", which ends at ", end);
    }
    end += entry->bytes;
  }
  if (end != limit)
    fail(path, ": data_offsets end at ", end, ", but the file has ", limit,
         " data bytes (truncated or damaged)");
}

/// The header of one file: its tensors with offsets in the file, and its metadata.
std::map<std::string, Entry> read_header(const MappedFile& file,
                                         std::map<std::string, std::string>& metadata) {
  const std::string& path = file.path();
  uint64_t length = 0;
  constexpr int64_t prefix = sizeof(length);
  if (file.size() < prefix)
    fail(path, ": ", file.size(), " bytes are too short for a safetensors header length");
  std::memcpy(&length, file.data(), sizeof(length));
  if (length > static_cast<uint64_t>(kMaxHeader))
    fail(path, ": header length ", length, " is over the limit of ", kMaxHeader, " bytes");
  const auto header = static_cast<int64_t>(length);
  if (header > file.size() - prefix)
    fail(path, ": header length ", length, " reaches beyond the file of ", file.size(),
         " bytes (truncated?)");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + prefix, length);
  if (text.empty() || text[0] != '{') fail(path, ": header does not begin with '{': no safetensors file");

  const json root = parse_json(text, path + ": header");
  const int64_t limit = file.size() - prefix - header;
  std::map<std::string, Entry> entries;
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) fail(path, ": __metadata__ is ", shown(value), ", expected an object");
      for (const auto& [key, word] : value.items()) {
        if (!word.is_string())
          fail(path, ": __metadata__ ", shown(json(key)), " is ", shown(word), ", expected a string");
        const auto [other, added] = metadata.emplace(key, word.get<std::string>());
        if (!added && other->second != word.get<std::string>())
          fail(path, ": __metadata__ ", shown(json(key)), " differs from that of another shard");
      }
      continue;
    }
    if (!printable(name))
      fail(path, ": tensor name ", shown(json(name)), " is empty, too long or unprintable");
    entries.emplace(name, read_entry(path + ": tensor " + name, value, limit));
  }
  check_coverage(path, entries, limit);
  for (auto& [name, entry] : entries) entry.offset += prefix + header;
  return entries;
}

/// True when some element's exponent is all ones: NaN or infinity.
template <class Bits>
std::optional<int64_t> first_not_finite(const std::byte* data, int64_t elements, Bits exponent) {
  for (int64_t i = 0; i < elements; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i * static_cast<int64_t>(sizeof(bits)), sizeof(bits));
    if ((bits & exponent) == exponent) return i;
  }
  return std::nullopt;
}

std::optional<int64_t> first_not_finite(const Tensor& tensor) {
  switch (tensor.dtype) {
    case DType::f32:
      return first_not_finite<uint32_t>(tensor.data, tensor.elements(), 0x7f800000u);
    case DType::f16:
      return first_not_finite<uint16_t>(tensor.data, tensor.elements(), 0x7c00u);
    case DType::bf16:
      return first_not_finite<uint16_t>(tensor.data, tensor.elements(), 0x7f80u);
    case DType::f64:
      return first_not_finite<uint64_t>(tensor.data, tensor.elements(), 0x7ff0000000000000ull);
    default:
      return std::nullopt;
  }
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ')';
  return text.str();
}

struct Checkpoint::Data {
  std::string root;  // directory or file, for messages
  std::vector<MappedFile> files;
  std::map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;

  void add(const std::string& path) {
    files.emplace_back(path);
    for (auto& [name, entry] : read_header(files.back(), metadata)) {
      entry.file = files.size() - 1;
      const auto [other, added] = entries.emplace(name, std::move(entry));
      if (!added) fail(path, ": tensor ", name, " is also in ", files[other->second.file].path());
    }
  }

  const std::byte* bytes_of(const Entry& entry) const { return files[entry.file].data() + entry.offset; }
};

Checkpoint::Checkpoint(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open_file(const std::string& path) {
  auto data = std::make_unique<Data>();
  data->root = path;
  data->add(path);
  return Checkpoint(std::move(data));
}

Checkpoint Checkpoint::open(const std::string& dir) {
  std::error_code ignored;
  const fs::path single = fs::path(dir) / "model.safetensors";
  if (fs::exists(single, ignored)) return open_file(single.string());
  const std::string index = (fs::path(dir) / "model.safetensors.index.json").string();
  if (!fs::exists(index, ignored))
    fail(dir, ": holds neither model.safetensors nor model.safetensors.index.json");

  const json root = read_json(index);
  const Fields fields(root, index);
  const json& map = fields.get("weight_map");
  if (!map.is_object() || map.empty()) fields.refuse("weight_map", "expected an object with tensors");
  std::map<std::string, std::vector<std::string>> shards;  // file → tensors
  for (const auto& [name, file] : map.items()) {
    const std::string where = "weight_map of " + shown(json(name)) + " is " + shown(file);
    if (!file.is_string()) fail(index, ": ", where, ", expected a file name");
    const auto shard = file.get<std::string>();
    if (!printable(shard) || shard.find_first_of("/\\") != std::string::npos ||
        shard.find("..") != std::string::npos)
      fail(index, ": ", where, ", expected a plain file name beside the index");
    shards[shard].push_back(name);
  }
  auto data = std::make_unique<Data>();
  data->root = dir;
  for (const auto& [shard, names] : shards) {
    const std::string path = (fs::path(dir) / shard).string();
    if (!fs::exists(path, ignored)) fail(index, ": weight_map names ", shard, ", which is absent");
    data->add(path);
    for (const std::string& name : names) {
      const auto entry = data->entries.find(name);
      if (entry == data->entries.end() || data->files[entry->second.file].path() != path)
        fail(path, ": tensor ", shown(json(name)), " is absent, but ", index, " says it is here");
    }
  }
  return Checkpoint(std::move(data));
}

std::optional<Tensor> Checkpoint::find(const std::string& name) const {
  const auto found = data_->entries.find(name);
  if (found == data_->entries.end()) return std::nullopt;
  const Entry& entry = found->second;
  const StoredType* type = find_stored_type(entry.dtype);
  if (!type->dtype)
    fail(file_of(name), ": tensor ", name, ": dtype ", entry.dtype, " is not supported (F32, F16, BF16 are)");
  return Tensor{name, *type->dtype, entry.shape, data_->bytes_of(entry), entry.bytes};
}

std::optional<Tensor> Checkpoint::find_bytes(const std::string& name) const {
  const auto found = data_->entries.find(name);
  if (found == data_->entries.end() || found->second.dtype != "U8") return std::nullopt;
  const Entry& entry = found->second;
  return Tensor{name, DType::u8, entry.shape, data_->bytes_of(entry), entry.bytes};
}

Tensor Checkpoint::get(const std::string& name, std::span<const int64_t> shape) const {
  std::optional<Tensor> tensor = find(name);
  if (!tensor) fail(data_->root, ": tensor ", name, " is absent, expected shape ", shape_text(shape));
  if (!std::equal(shape.begin(), shape.end(), tensor->shape.begin(), tensor->shape.end())) {
    fail(file_of(name), ": tensor ", name, ": shape is ", shape_text(tensor->shape), ", expected ",
         shape_text(shape));
  }
  return std::move(*tensor);
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : data_->entries) names.push_back(name);
  return names;
}

const std::map<std::string, std::string>& Checkpoint::metadata() const {
  return data_->metadata;
}

std::string Checkpoint::file_of(const std::string& name) const {
  const auto entry = data_->entries.find(name);
  return entry == data_->entries.end() ? data_->root : data_->files[entry->second.file].path();
}

int64_t Checkpoint::bytes() const {
  int64_t total = 0;
  for (const auto& [name, entry] : data_->entries) total += entry.bytes;
  return total;
}

void Checkpoint::release(const Tensor& tensor) const {
  for (const MappedFile& file : data_->files) {
    const std::less_equal<const std::byte*> before_or_at;
    if (file.data() && before_or_at(file.data(), tensor.data) &&
        before_or_at(tensor.data + tensor.bytes, file.data() + file.size()))
      return file.release(tensor.data - file.data(), tensor.bytes);
  }
}

void Checkpoint::check_finite() const {
  for (const auto& [name, entry] : data_->entries) {
    if (!find_stored_type(entry.dtype)->dtype) continue;  // integers are finite
    const Tensor tensor = *find(name);
    const auto place = first_not_finite(tensor);
    if (place)
      fail(file_of(name), ": tensor ", name, ": element ", *place, " is ",
           load_element(tensor.data, tensor.dtype, *place));
    release(tensor);
  }
}

std::string Checkpoint::fingerprint() const {
  constexpr int64_t kEdge = 4096, kPlaces = 64, kPlace = 64;  // bytes, places, bytes of each
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), XXH3_freeState);
  if (!state) fail(data_->root, ": out of memory");
  XXH3_64bits_reset(state.get());
  const auto add = [&](const void* bytes, int64_t count) {
    XXH3_64bits_update(state.get(), bytes, static_cast<size_t>(count));
  };
  for (const auto& [name, entry] : data_->entries) {
    const std::string title = name + '\n' + entry.dtype + '\n' + shape_text(entry.shape) + '\n';
    add(title.data(), static_cast<int64_t>(title.size()));
    const std::byte* data = data_->bytes_of(entry);
    const int64_t middle = entry.bytes - 2 * kEdge;
    if (middle <= kPlaces * kPlace) {
      add(data, entry.bytes);
      continue;
    }
    add(data, kEdge);
    for (int64_t i = 0; i < kPlaces; ++i) add(data + kEdge + middle / kPlaces * i, kPlace);
    add(data + entry.bytes - kEdge, kEdge);
    data_->files[entry.file].release(entry.offset, entry.bytes);
  }
  std::ostringstream text;
  text << std::hex;
  text.width(16);
  text.fill('0');
  text << XXH3_64bits_digest(state.get());
  return text.str();
}

}  // namespace larosa
