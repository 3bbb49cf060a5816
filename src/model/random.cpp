#include "model/random.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "base/quant.h"
#include "io/files.h"
#include "io/json.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

/// splitmix64's output function: equal on every machine, and any element can be made alone.
uint64_t hash(uint64_t seed, uint64_t i) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/// Bits of the values ±[1, 2)·2^exponent: sign and mantissa are random, the exponent is not.
struct Bits {
  int shift;  // of a random 64-bit word's part
  uint64_t random, fixed;
};
Bits bits_of(DType dtype, int exponent) {
  const auto e = [exponent](int64_t bias) { return static_cast<uint64_t>(exponent + bias); };
  switch (dtype) {
    case DType::bf16:
      return {16, 0x807f, e(127) << 7};
    case DType::f16:
      return {16, 0x83ff, e(15) << 10};
    default:
      return {32, 0x807fffff, e(127) << 23};
  }
}

/// Power of two for values that `in` inputs are multiplied with: |w| in [2^e, 2^(e+1)) times levels of root
/// mean square `level` keeps the mean square below 1/in. 1.53 is the root mean square of [1, 2).
int exponent_for(int64_t in, double level) {
  return std::max(-14, -static_cast<int>(std::ceil(std::log2(1.53 * level * std::sqrt(in)))));
}

/// Fills elements [0, n) of a tensor whose rows meet `in` inputs.
void fill(std::byte* data, DType dtype, int64_t n, int64_t in, uint64_t seed, ThreadPool& pool) {
  const int exponent = exponent_for(in, 1);
  const Bits bits = bits_of(dtype, exponent);
  const int per_word = 64 / bits.shift;
  pool.split(n, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += per_word) {
      uint64_t word = hash(seed, static_cast<uint64_t>(i / per_word));
      for (int64_t j = i; j < std::min<int64_t>(end, i + per_word); ++j, word >>= bits.shift) {
        const uint64_t value = (word & bits.random) | bits.fixed;
        std::memcpy(data + j * dtype_size(dtype), &value, static_cast<size_t>(dtype_size(dtype)));
      }
    }
  });
}

/// Quantised lines whose rows meet `in` inputs: uniform levels, scales in [1, 2) of a power of two.
void fill_lines(std::byte* data, const Weight& w, int64_t in, uint64_t seed, ThreadPool& pool) {
  const bool narrow = w.dtype == DType::int4;
  const int64_t n = w.line_length(), bytes = w.line_bytes(), levels = scales_offset(w.dtype, n);
  const int64_t scales = padded_line(n) / quant_group(w.dtype);
  // int8: odd levels only, which leaves out −128 and zero; their root mean square, and that of −8 … 7.
  const uint64_t odd = narrow ? 0 : 0x0101010101010101ull;
  const uint64_t exponent = static_cast<uint64_t>(exponent_for(in, narrow ? 4.64 : 73.9) + 15) << 10;
  pool.split(w.lines(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      std::byte* line = data + l * bytes;
      uint64_t place = static_cast<uint64_t>(l * (bytes / 8));
      for (int64_t i = 0; i < levels; i += 8) {
        const uint64_t word = hash(seed, place++) | odd;
        std::memcpy(line + i, &word, sizeof(word));
      }
      for (int64_t i = 0; i < scales; ++i) {
        const auto scale = static_cast<uint16_t>((hash(seed ^ 1, place++) & 0x3ff) | exponent);
        std::memcpy(line + levels + 2 * i, &scale, sizeof(scale));
      }
      std::memset(line + levels + 2 * scales, 0, static_cast<size_t>(bytes - levels - 2 * scales));
    }
  });
}

/// Memory of a model, each tensor with a seed of its own.
class Filler {
 public:
  Filler(Model& model, const RandomOptions& options, ThreadPool& pool)
      : model_(model), options_(options), pool_(pool) {}

  Adapter adapter(DType dtype) {
    const int64_t dim = model_.config.dim;
    Adapter made{weight(dim, dim, dtype, Layout::channels), {}};
    if (quantised(dtype)) made.top = weight(std::min(kAdapterTop, dim), dim, DType::f32, Layout::channels);
    return made;
  }
  Weight weight(int64_t in, int64_t out, DType dtype, Layout layout) {
    Weight w{nullptr, nullptr, dtype, layout, in, out};
    if (!quantised(dtype)) {
      w.data = bytes(in * out, in, dtype);
    } else {
      std::byte* lines = memory(w.bytes());
      fill_lines(lines, w, in, next_seed(), pool_);
      w.data = lines;
    }
    return w;
  }
  const float* ones(int64_t n) {
    auto* values = reinterpret_cast<float*>(bytes(n, n, DType::f32));
    std::fill_n(values, n, 1.0f);
    return values;
  }
  const float* vector(int64_t n) { return reinterpret_cast<float*>(bytes(n, n, DType::f32)); }
  /// Score weights: the values' sizes, in [1, 2) of a power of two.
  const float* scale(int64_t n) {
    auto* values = reinterpret_cast<float*>(bytes(n, n, DType::f32));
    for (int64_t i = 0; i < n; ++i) values[i] = std::abs(values[i]);
    return values;
  }

 private:
  std::byte* bytes(int64_t elements, int64_t in, DType dtype) {
    std::byte* data = memory(elements * dtype_size(dtype));
    fill(data, dtype, elements, in, next_seed(), pool_);
    return data;
  }
  std::byte* memory(int64_t size) {
    model_.memory.emplace_back(size);
    return model_.memory.back().data();
  }
  uint64_t next_seed() { return hash(options_.seed, tensors_++); }

  Model& model_;
  const RandomOptions& options_;
  ThreadPool& pool_;
  uint64_t tensors_ = 0;
};

/// Name and shape of every tensor of a Hugging Face checkpoint of this shape.
std::vector<SafetensorsWriter::Entry> checkpoint_tensors(const ModelConfig& c, DType dtype) {
  const TensorNames& names = *find_architecture(c.architecture, "config").names;
  std::vector<SafetensorsWriter::Entry> entries = {{names.embed, dtype, {c.vocab, c.dim}}};
  const auto add = [&](std::string name, int64_t l, std::vector<int64_t> shape) {
    if (const size_t place = name.find("{}"); place != std::string::npos)
      name.replace(place, 2, std::to_string(l));
    entries.push_back({name, dtype, std::move(shape)});
  };
  for (int64_t l = 0; l < c.layers; ++l) {
    add(names.norm_attn, l, {c.dim});
    for (Projection p : kProjections) {
      const std::string name = names.projection[static_cast<size_t>(p)];
      add(name + ".weight", l, {projection_out(c, p), projection_in(c, p)});
      const bool biased = (site_of(p) == Site::h1 && c.bias_qkv) || (p == Projection::wo && c.bias_o);
      if (biased) add(name + ".bias", l, {projection_out(c, p)});
    }
    if (c.qk_norm) {
      add(names.norm_q, l, {c.head_dim});
      add(names.norm_k, l, {c.head_dim});
    }
    add(names.norm_mlp, l, {c.dim});
  }
  add(names.norm_out, 0, {c.dim});
  if (!c.tied) add(names.head, 0, {c.vocab, c.dim});
  return entries;
}

int64_t elements(const SafetensorsWriter::Entry& entry) {
  int64_t n = 1;
  for (int64_t d : entry.shape) n *= d;
  return n;
}

void write_tensor(SafetensorsWriter& writer, const SafetensorsWriter::Entry& entry, uint64_t seed,
                  ThreadPool& pool, const std::function<void(int64_t)>& wrote) {
  constexpr int64_t kPart = 1 << 25;  // elements at once
  const bool ones = entry.name.find("norm") != std::string::npos;
  const int64_t n = elements(entry), size = dtype_size(entry.dtype);
  std::vector<std::byte> part(static_cast<size_t>(std::min(n, kPart) * size));
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t count = std::min(kPart, n - first);
    if (ones) {
      for (int64_t i = 0; i < count; ++i) store_element(part.data(), entry.dtype, i, 1.0);
    } else {
      fill(part.data(), entry.dtype, count, entry.shape.back(), hash(seed, static_cast<uint64_t>(first)),
           pool);
    }
    writer.write(entry.name, first * size, part.data(), count * size);
    wrote(count * size);
  }
}

/// The 256 bytes as tokens, in GPT-2's byte alphabet: printable bytes stand for themselves, the others for
/// U+0100 onwards.
std::string byte_tokenizer() {
  nlohmann::json vocab = nlohmann::json::object();
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool plain = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
    const int c = plain ? byte : next++;
    std::string utf8;
    if (c < 0x80) {
      utf8 += static_cast<char>(c);
    } else {
      utf8 += static_cast<char>(0xc0 | c >> 6);
      utf8 += static_cast<char>(0x80 | (c & 0x3f));
    }
    vocab[utf8] = byte;
  }
  const nlohmann::json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  return nlohmann::json({{"version", "1.0"},
                         {"added_tokens", nlohmann::json::array()},
                         {"normalizer", nullptr},
                         {"pre_tokenizer", level},
                         {"post_processor", nullptr},
                         {"decoder", level},
                         {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}})
      .dump(1);
}

}  // namespace

Model make_random_model(const ModelConfig& c, const Plan& plan, const RandomOptions& options,
                        ThreadPool& pool) {
  validate(plan, plan_shape(c), "random model");
  Model model;
  model.config = c;
  model.plan = plan;
  Filler filler(model, options, pool);
  const DType adapters = options.adapters.value_or(companion(options.weights));
  const DType head = options.head.value_or(companion(options.weights));
  model.outer.embed = filler.weight(c.dim, c.vocab, head, Layout::rows);
  model.outer.head = c.tied ? model.outer.embed : filler.weight(c.dim, c.vocab, head, Layout::rows);
  model.outer.norm_out = filler.ones(c.dim);
  for (const LayerPlan& layer_plan : plan.layers) {
    Layer layer;
    layer.plan = layer_plan;
    LayerWeights& w = layer.weights;
    for (Projection p : kProjections) {
      w[p] = filler.weight(projection_in(c, p), projection_out(c, p), options.weights,
                           stored_layout(layer_plan, p));
      if (c.bias_qkv && site_of(p) == Site::h1) w[p].bias = filler.vector(w[p].out);
      if (c.bias_o && p == Projection::wo) w[p].bias = filler.vector(w[p].out);
    }
    w.norm_attn = filler.ones(c.dim);
    w.norm_mlp = filler.ones(c.dim);
    if (c.qk_norm) {
      w.norm_q = filler.ones(c.head_dim);
      w.norm_k = filler.ones(c.head_dim);
    }
    for (const Group& group : layer_plan.groups) {
      if (group.rule.rotated) fail("random model: run-time bases are not made");
      GroupData data;
      if (group.rule.scaled) data.scale = filler.scale(projection_in(c, group.projections[0]));
      for (const Projection p : group.projections) {
        if (group.rank == 0) break;
        data.low.push_back(
            {filler.weight(projection_in(c, p), group.rank, options.weights,
                           low_in_layout(quantised(options.weights))),
             filler.weight(group.rank, projection_out(c, p), options.weights, Layout::channels)});
      }
      layer.groups.push_back(data);
    }
    if (layer_plan.middle) layer.middle = filler.adapter(adapters);
    if (layer_plan.adapter) layer.adapter = filler.adapter(adapters);
    model.layers.push_back(std::move(layer));
  }
  return model;
}

void write_random_checkpoint(const std::string& config_file, const std::string& path,
                             const RandomOptions& options, int64_t shard_bytes, ThreadPool& pool,
                             const std::function<void(int64_t, int64_t)>& progress) {
  CHECK(!quantised(options.weights));
  nlohmann::json json = read_json(config_file);
  const ModelConfig config = parse_config(json, config_file);
  if (config.vocab < 256)
    fail(config_file, ": vocab_size is ", config.vocab, ", expected at least 256 bytes");
  const std::string dir = vacant_path(path), partial = dir + ".partial";
  json["torch_dtype"] = options.weights == DType::bf16  ? "bfloat16"
                        : options.weights == DType::f16 ? "float16"
                                                        : "float32";
  std::vector<std::vector<SafetensorsWriter::Entry>> shards(1);
  int64_t total = 0, in_shard = 0, done = 0;
  for (SafetensorsWriter::Entry& entry : checkpoint_tensors(config, options.weights)) {
    const int64_t bytes = elements(entry) * dtype_size(entry.dtype);
    if (!shards.back().empty() && in_shard + bytes > shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    in_shard += bytes;
    total += bytes;
    shards.back().push_back(std::move(entry));
  }
  std::error_code reason;
  if (!fs::create_directory(partial, reason))
    fail(partial, ": ", reason ? reason.message() : "exists already; remove it to start again");
  try {
    nlohmann::json map = nlohmann::json::object();
    uint64_t tensor = 0;
    for (size_t i = 0; i < shards.size(); ++i) {
      char name[64] = "model.safetensors";
      if (shards.size() > 1)
        std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      SafetensorsWriter writer((fs::path(partial) / name).string(), shards[i], {{"format", "pt"}});
      for (const SafetensorsWriter::Entry& entry : shards[i]) {
        map[entry.name] = name;
        write_tensor(writer, entry, hash(options.seed, tensor++), pool, [&](int64_t bytes) {
          done += bytes;
          if (progress) progress(done, total);
        });
      }
      writer.finish();
    }
    if (shards.size() > 1) {
      write_file((fs::path(partial) / "model.safetensors.index.json").string(),
                 nlohmann::json({{"metadata", {{"total_size", total}}}, {"weight_map", map}}).dump(1));
    }
    write_file((fs::path(partial) / "config.json").string(), json.dump(2) + "\n");
    write_file((fs::path(partial) / "tokenizer.json").string(), byte_tokenizer() + "\n");
    fs::rename(partial, dir);
  } catch (const fs::filesystem_error& e) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    fail(e.path1().string(), ": ", e.code().message());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
}

}  // namespace larosa
