#include "calib/shards.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "calib/sparsify_job.h"
#include "io/files.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

// What people keep beside the weights; everything else of the source is not ours to copy.
constexpr const char* kCopied[] = {"tokenizer.json",    "tokenizer.model",        "vocab.json",
                                   "merges.txt",        "tokenizer_config.json",  "special_tokens_map.json",
                                   "added_tokens.json", "generation_config.json", "chat_template.jinja"};

std::string shard_name(const SparsifyJob& job, int64_t index) {
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors", static_cast<int>(index + 1),
                static_cast<int>(job.config.layers + 1));
  return name;
}

/// A (vocab, dim) table, some rows at a time.
void write_table(const SparsifyJob& job, SafetensorsWriter& writer, const std::string& name,
                 const Weight& table, const float* gain, const Matrix& basis, DType dtype) {
  constexpr int64_t kRows = 4096;
  const int64_t row_bytes = line_bytes(dtype, table.in);
  for (int64_t first = 0; first < table.out; first += kRows) {
    throw_if_interrupted();
    const int64_t count = std::min(kRows, table.out - first);
    const Matrix rows = fold_rows(table, first, count, gain, basis, *job.algebra, job.pool);
    const FoldedTensor part = stored_tensor(name, rows, dtype, job.pool);
    writer.write(name, first * row_bytes, part.bytes.data(), static_cast<int64_t>(part.bytes.size()));
  }
  job.release(table);
}

void write_index(const SparsifyJob& job) {
  nlohmann::json map = nlohmann::json::object();
  int64_t total = 0;
  for (int64_t i = 0; i <= job.config.layers; ++i) {
    const Checkpoint shard = Checkpoint::open_file(shard_path(job, i).string());
    for (const std::string& name : shard.names()) map[name] = shard_name(job, i);
    total += shard.bytes();
  }
  write_file((fs::path(job.partial) / "model.safetensors.index.json").string(),
             nlohmann::json({{"metadata", {{"total_size", total}}}, {"weight_map", map}}).dump(1));
}

void write_config(const SparsifyJob& job) {
  const Plan& plan = job.plan;
  std::ifstream in(fs::path(job.options.source) / "config.json");
  nlohmann::json config = nlohmann::json::parse(in);
  config["architectures"] = {"LarosaForCausalLM"};
  const auto stored = Checkpoint::open_file(shard_path(job, 0).string()).names();
  config["tie_word_embeddings"] = std::find(stored.begin(), stored.end(), "head") == stored.end();
  config["larosa"] = {{"version", kPlanVersion},
                      {"method", plan.method},
                      {"form", plan.form},
                      {"sparsity", plan.sparsity},
                      {"weights", plan.notes.at("weights")},
                      {"head", plan.notes.at("head")},
                      {"embedding", plan.notes.at("embedding")},
                      {"source", plan.fingerprint}};
  if (plan.notes.contains("adapters")) config["larosa"]["adapters"] = plan.notes.at("adapters");
  write_file((fs::path(job.partial) / "config.json").string(), config.dump(2) + "\n");
}

}  // namespace

fs::path shard_path(const SparsifyJob& job, int64_t index) {
  return fs::path(job.partial) / shard_name(job, index);
}

std::map<std::string, std::string> shard_metadata(const SparsifyJob& job) {
  return {{"format", "larosa"}, {"larosa.fingerprint", job.plan.fingerprint}};
}

fs::path folded_path(const SparsifyJob& job) {
  return fs::path(job.partial) / "folded.tmp";
}

void fold_to(const fs::path& path, const SparsifyJob& job, int64_t l, const StoredTypes& types,
             std::optional<DType> low_rank_type) {
  const LayerPlan& plan = job.plan.layers[static_cast<size_t>(l)];
  const LayerWeights weights = load_layer(job.checkpoint, job.config, l);
  const Bases bases = job.findings.read_bases(l, job.config, job.wants);
  Bases next;
  if (plan.adapter) next = job.findings.read_bases(l + 1, job.config, job.wants);
  const auto low_rank = [&](Projection p, const Matrix& m, int64_t rank) {
    return job.findings.low_rank_of(l, p, m, rank, *job.algebra);
  };
  const FoldJob fold{job.config,
                     weights,
                     bases,
                     plan.adapter ? &next : nullptr,
                     plan,
                     job.choice.form,
                     job.choice.after_gain,
                     types,
                     low_rank_type,
                     low_rank};
  std::vector<FoldedTensor> tensors;
  fold_layer(fold, l, *job.algebra, job.pool, [&](FoldedTensor&& tensor) {
    throw_if_interrupted();
    tensors.push_back(std::move(tensor));
  });
  job.release_layer(l);
  write_tensors(path, tensors, shard_metadata(job));
}

void write_layer(SparsifyJob& job, int64_t l) {
  const fs::path path = shard_path(job, l + 1);
  if (!fs::exists(path)) fold_to(path, job, l, job.options.types);
  job.tick(kFoldUnits, job.layer_note("folding", l));
}

void write_outer(SparsifyJob& job) {
  const ModelConfig& config = job.config;
  const fs::path path = shard_path(job, 0);
  if (fs::exists(path)) return job.tick(kFoldUnits, "embedding");
  const OuterWeights outer = load_outer(job.checkpoint, config);
  Bases first, last;
  if (job.choice.form == Form::folded) {
    first = job.findings.read_bases(0, config, job.wants);
    last = job.findings.read_bases(config.layers - 1, config, job.wants);
  }
  const bool rewrites = rewrites_stream(job.choice.form, first);
  const DType embed = job.options.types.embed.value_or(outer.embed.dtype);
  const DType head = job.options.types.head.value_or(outer.head.dtype);
  const bool untied = rewrites || outer.head.data != outer.embed.data || head != embed;
  std::vector<SafetensorsWriter::Entry> entries = {stored_entry("embed", embed, config.vocab, config.dim)};
  if (untied) entries.push_back(stored_entry("head", head, config.vocab, config.dim));
  const bool keeps_gain = !rewrites && outer.norm_out;
  if (keeps_gain) entries.push_back({"norm_out", DType::f32, {config.dim}});
  auto metadata = shard_metadata(job);
  metadata["larosa.plan"] = plan_to_json(job.plan);
  const std::string temporary = path.string() + ".tmp";
  SafetensorsWriter writer(temporary, entries, metadata);
  write_table(job, writer, "embed", outer.embed, nullptr, first.stream, embed);
  if (untied) {
    const float* gain = rewrites ? outer.norm_out : nullptr;
    write_table(job, writer, "head", outer.head, gain, last.last(), head);
  }
  if (keeps_gain) writer.write("norm_out", 0, outer.norm_out, config.dim * 4);
  writer.finish();
  fs::rename(temporary, path);
  job.tick(kFoldUnits, "embedding");
}

void write_surroundings(const SparsifyJob& job) {
  write_index(job);
  write_config(job);
  for (const char* name : kCopied) {
    const fs::path from = fs::path(job.options.source) / name;
    if (fs::exists(from))
      fs::copy_file(from, fs::path(job.partial) / name, fs::copy_options::overwrite_existing);
  }
}

}  // namespace larosa
