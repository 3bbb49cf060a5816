#include "calib/findings.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/files.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPrefixes[] = {"basis-", "curves-", "plan-", "rank-"};

fs::path file_of(const fs::path& dir, const char* prefix, int64_t l, const char* suffix) {
  return dir / (prefix + std::to_string(l) + suffix);
}
fs::path bases_file(const fs::path& dir, int64_t l) {
  return file_of(dir, "basis-", l, ".safetensors");
}
fs::path curves_file(const fs::path& dir, int64_t l) {
  return file_of(dir, "curves-", l, ".json");
}
fs::path plan_file(const fs::path& dir, int64_t l) {
  return file_of(dir, "plan-", l, ".json");
}

FoldedTensor wide_tensor(const std::string& name, const Matrix& m) {
  FoldedTensor tensor{name, DType::f64, {m.rows, m.cols}, {}};
  const auto* bytes = reinterpret_cast<const std::byte*>(m.data.data());
  tensor.bytes.assign(bytes, bytes + m.data.size() * sizeof(double));
  return tensor;
}

Matrix read_wide(const Checkpoint& file, const std::string& name, int64_t rows, int64_t cols) {
  const int64_t shape[2] = {rows, cols};
  const Tensor tensor = file.get(name, shape);
  if (tensor.dtype != DType::f64) fail(file.file_of(name), ": tensor ", name, ": expected F64");
  Matrix m(rows, cols);
  std::copy_n(tensor.data, tensor.bytes, reinterpret_cast<std::byte*>(m.data.data()));
  return m;
}

bool is_finding(const fs::path& file) {
  const std::string name = file.filename().string();
  return std::ranges::any_of(kPrefixes, [&](const char* prefix) { return name.starts_with(prefix); });
}

}  // namespace

void write_tensors(const fs::path& path, std::span<const FoldedTensor> tensors,
                   const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const FoldedTensor& t : tensors) entries.push_back({t.name, t.dtype, t.shape});
  const std::string temporary = path.string() + ".tmp";
  SafetensorsWriter writer(temporary, entries, metadata);
  for (const FoldedTensor& t : tensors)
    writer.write(t.name, 0, t.bytes.data(), static_cast<int64_t>(t.bytes.size()));
  writer.finish();
  fs::rename(temporary, path);
}

bool Findings::has_bases(int64_t l) const {
  return fs::exists(bases_file(kept_, l));
}

void Findings::write_bases(int64_t l, const Bases& bases) const {
  std::vector<FoldedTensor> tensors;
  if (!bases.stream.empty()) tensors.push_back(wide_tensor("stream", bases.stream));
  if (!bases.mlp.empty()) tensors.push_back(wide_tensor("mlp", bases.mlp));
  for (size_t g = 0; g < bases.heads.size(); ++g)
    tensors.push_back(wide_tensor("head." + std::to_string(g), bases.heads[g]));
  write_tensors(bases_file(kept_, l), tensors, {});
}

Bases Findings::read_bases(int64_t l, const ModelConfig& config, const Wants& wants) const {
  Bases bases;
  if (!wants.bases()) return bases;
  const Checkpoint file = Checkpoint::open_file(bases_file(kept_, l).string());
  if (wants.stream) bases.stream = read_wide(file, "stream", config.dim, config.dim);
  if (wants.mlp) bases.mlp = read_wide(file, "mlp", config.dim, config.dim);
  for (int64_t g = 0; wants.heads && g < config.kv_heads; ++g)
    bases.heads.push_back(read_wide(file, "head." + std::to_string(g), config.head_dim, config.head_dim));
  return bases;
}

bool Findings::has_curves(int64_t l) const {
  return fs::exists(curves_file(kept_, l));
}

void Findings::write_curves(int64_t l, const std::vector<Curve>& curves) const {
  nlohmann::json errors = nlohmann::json::array();
  for (const Curve& curve : curves) errors.push_back(curve.errors);
  write_file(curves_file(kept_, l).string(), errors.dump());
}

std::vector<Curve> Findings::read_curves(int64_t l, const ModelConfig& config,
                                         const LayerPlan& outline) const {
  const std::string file = curves_file(kept_, l).string();
  const nlohmann::json found = parse_json(read_file(file), file);
  std::vector<Curve> curves;
  for (size_t g = 0; g < outline.groups.size(); ++g) {
    Curve curve{group_weights(config, outline.groups[g]), {}};
    const bool fits = found.is_array() && found.size() == outline.groups.size() && found[g].is_array() &&
                      found[g].size() == kCurveLevels.size();
    for (size_t i = 0; fits && i < found[g].size(); ++i)
      if (found[g][i].is_number()) curve.errors.push_back(found[g][i].get<double>());
    if (curve.errors.size() != kCurveLevels.size()) fail(file, ": does not hold a layer's curves");
    curves.push_back(std::move(curve));
  }
  return curves;
}

bool Findings::has_plan(int64_t l) const {
  return fs::exists(plan_file(work_, l));
}

void Findings::write_plan(int64_t l, const LayerPlan& plan) const {
  Plan one;
  one.layers = {plan};
  write_file(plan_file(work_, l).string(), plan_to_json(one));
}

LayerPlan Findings::read_plan(int64_t l, const LayerPlan& outline) const {
  const std::string file = plan_file(work_, l).string();
  const Plan one = plan_from_json(read_file(file), file);
  if (one.layers.size() != 1) fail(file, ": ", one.layers.size(), " layers, expected 1");
  const LayerPlan& found = one.layers[0];
  LayerPlan numbers = outline;
  for (size_t g = 0; g < std::min(outline.groups.size(), found.groups.size()); ++g) {
    numbers.groups[g].rule.keep = found.groups[g].rule.keep;
    numbers.groups[g].rule.cut = found.groups[g].rule.cut;
  }
  numbers.neurons.keep = found.neurons.keep;
  numbers.neurons.cut = found.neurons.cut;
  if (found != numbers) fail(file, ": is no plan of layer ", l, " for this method");
  return numbers;
}

std::pair<Matrix, Matrix> Findings::low_rank_of(int64_t l, Projection p, const Matrix& m, int64_t rank,
                                                Algebra& algebra) const {
  const std::string suffix = std::string("-") + projection_name(p) + ".safetensors";
  const fs::path path = file_of(work_, "rank-", l, suffix.c_str());
  if (fs::exists(path)) {
    const Checkpoint file = Checkpoint::open_file(path.string());
    return {read_wide(file, "in", m.rows, rank), read_wide(file, "out", rank, m.cols)};
  }
  auto product = low_rank(m, rank, algebra);
  const FoldedTensor tensors[] = {wide_tensor("in", product.first), wide_tensor("out", product.second)};
  write_tensors(path, tensors, {});
  return product;
}

bool Findings::any() const {
  std::error_code ignored;
  return std::ranges::any_of(fs::directory_iterator(work_, ignored),
                             [](const auto& entry) { return is_finding(entry.path()); });
}

void Findings::remove() const {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(work_))
    if (is_finding(entry.path())) files.push_back(entry.path());
  for (const fs::path& file : files) fs::remove(file);
}

}  // namespace larosa
