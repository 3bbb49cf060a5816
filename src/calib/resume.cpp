#include "calib/resume.h"

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "calib/shards.h"
#include "calib/sparsify_job.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;

constexpr const char* kBegunOtherwise =
    ": was begun with other options, text or model, or by another version; remove it to start again";

std::string job_file(const std::string& dir) {
  return (fs::path(dir) / "job.json").string();
}

nlohmann::json options_json(const SparsifyOptions& options) {
  const Choice& choice = options.choice;
  return {{"method", options.method},
          {"sparsity", choice.sparsity},
          {"count_adapters", options.count_adapters},
          {"site_scale", choice.site_scale},
          {"form", static_cast<int>(choice.form)},
          {"score", static_cast<int>(choice.score)},
          {"source", static_cast<int>(choice.source)},
          {"basis_layers", choice.basis_layers},
          {"basis_weights", choice.basis_weights},
          {"rotate", choice.rotate},
          {"rotate_h2", choice.rotate_h2},
          {"mix", choice.mix},
          {"after_gain", choice.after_gain},
          {"allocation", static_cast<int>(choice.allocation)},
          {"stream", static_cast<int>(choice.stream)},
          {"currency", static_cast<int>(choice.currency)},
          {"shrink", choice.shrink},
          {"weights", type_name(options.types.weights)},
          {"adapters", type_name(options.types.adapters)},
          {"head", type_name(options.types.head)},
          {"embedding", type_name(options.types.embed)},
          {"gptq", options.gptq}};
}

/// Everything that decides a byte of the output: what was asked for, not what calibration makes of it.
/// Without the budget: everything that decides the bases and curves.
std::string job_text(const SparsifyJob& job, bool budget) {
  const std::string_view text(reinterpret_cast<const char*>(job.tokens.data()), job.tokens.size_bytes());
  // The fingerprint names the tensors; a base frequency or a norm's epsilon stands in the config alone.
  const std::string config = read_file((fs::path(job.options.source) / "config.json").string());
  nlohmann::json options = options_json(job.options), notes = job.plan.notes;
  if (!budget) {
    for (const char* field : {"sparsity", "count_adapters"}) options.erase(field);
    notes.clear();  // a note can hang on the budget: rsparse's mix is named where ranks are left
  }
  return nlohmann::json({{"version", kPlanVersion},
                         {"options", options},
                         {"notes", notes},
                         {"fingerprint", job.plan.fingerprint},
                         {"text", fingerprint_of(text)},
                         {"window", job.window},
                         {"config", fingerprint_of(config)},
                         {"products", job.backend.products_name()}})
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// Opens or begins the directory of what the next sparsity can use.
void open_kept(const SparsifyJob& job) {
  const std::string& kept = job.options.kept;
  if (kept.empty()) return;
  const std::string file = job_file(kept), text = job_text(job, false);
  fs::create_directory(kept);
  if (!fs::exists(file) && fs::is_empty(kept)) return write_file(file, text);
  if (!fs::exists(file) || read_file(file) != text) fail(kept, kBegunOtherwise);
}

}  // namespace

void PartialDirectory::open() {
  open_kept(job_);
  const std::string file = job_file(job_.partial), text = job_text(job_, true);
  fs::create_directory(job_.partial);
  lock_.emplace(job_.partial);
  vacant_path(job_.output);  // another process may have completed it meanwhile
  if (fs::exists(file) || !fs::is_empty(job_.partial)) {
    if (!fs::exists(file) || read_file(file) != text) fail(job_.partial, kBegunOtherwise);
    owned_ = true;
    std::fprintf(stderr, "sparsify: resuming from %s\n", job_.partial.c_str());
    return;
  }
  owned_ = true;
  write_file(file, text);
}

bool PartialDirectory::abandon() const {
  if (!owned_) return false;
  std::error_code ignored;
  if (job_.findings.any()) return true;
  for (const auto& entry : fs::directory_iterator(job_.partial, ignored))
    if (entry.path().extension() == ".safetensors") return true;
  fs::remove_all(job_.partial, ignored);
  return false;
}

void PartialDirectory::complete() const {
  job_.findings.remove();
  fs::remove(job_file(job_.partial));
  fs::remove(folded_path(job_));
  vacant_path(job_.output);
  fs::rename(job_.partial, job_.output);
}

}  // namespace larosa
