// What a sweep measures, as a table: one row per method, sparsity, text and mode. The CSV is the only store
// of these numbers: a sweep resumes from it and the report is made from it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace larosa {

inline constexpr double kMissing = std::numeric_limits<double>::quiet_NaN();

/// One measurement. A number that was not measured is NaN, an empty field of the file.
struct ResultRow {
  std::string method;       // as it was asked for; "dense": the model as it came
  std::string form;         // Plan::form
  double sparsity = 0;      // asked for, share of the projections' weight bytes
  bool extra = false;       // measured for PPL-p %, not part of the grid
  std::string text;         // name of the text
  double dense_prompt = 0;  // the mode: share of each window that runs dense and is not scored
  double ppl = kMissing, ppl_error = kMissing;
  double dense_ppl = kMissing;
  double kl = kMissing, kl_error = kMissing;  // to the dense model, nats per token
  double same_top = kMissing;  // share of predictions whose most likely token is the dense model's
  // Share of the projections' weights that a sparse token of this text did not read, low-rank products
  // counted as read: that of their bytes where all stand in one type without padding.
  double reached = kMissing;
  std::array<double, 4> site = {kMissing, kMissing, kMissing, kMissing};  // entries dropped, by Site
  // Of the projections and low-rank products, read per sparse token: what the plan keeps; thresholds: the
  // share reached of the stored bytes; simulated bases: of the source's, as deployed.
  double weight_bytes = kMissing;
  double adapter_bytes = kMissing;  // per token
  double total_bytes = kMissing;    // per token, but for keys and values; missing where bases are simulated
  double dense_bytes = kMissing;    // the same of the dense model
  double speed = kMissing, dense_speed = kMissing;  // tokens/s of decoding, alternating
  double sparsify_seconds = kMissing, seconds = kMissing;
  double windows = kMissing, predictions = kMissing;
  std::string refused;  // why the method does not offer this sparsity; empty: measured
};

/// RFC 4180 lines with a header. Numbers are written so that reading gives the same bits.
std::string results_to_csv(std::span<const ResultRow> rows);
/// Throws Error naming `source`, line and column.
std::vector<ResultRow> results_from_csv(const std::string& text, const std::string& source);

/// How much thinning one layer alone costs: the others read every channel.
struct LayerRow {
  std::string method;
  double sparsity = 0;
  int64_t layer = 0;
  double kl = 0, kl_error = 0;  // to the same weights with every channel read, nats per token
};
std::string layers_to_csv(std::span<const LayerRow> rows);
std::vector<LayerRow> layers_from_csv(const std::string& text, const std::string& source);

/// A measured point of a method on one text in one mode.
struct Point {
  double sparsity, ppl;
};
/// Where a method's perplexity crosses (1 + share) times dense.
struct Crossing {
  double low, high;               // measured neighbours, or 0 below the least and the most sparse one above
  std::optional<double> between;  // the interpolated sparsity; nothing: not crossed up to `high`
};
/// PPL-p % (Sparsing Law, arXiv 2411.02335): the sparsity at which perplexity is (1 + share) · dense. log
/// perplexity is interpolated linearly in sparsity between measured points, made monotone by its running
/// maximum, and is the dense one at sparsity 0. `points` in any order, not empty.
Crossing ppl_crossing(std::vector<Point> points, double dense, double share);

}  // namespace larosa
