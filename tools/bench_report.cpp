// The JSON object of a row is the one truth; csv and md print from it.
#include "bench_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/median.h"
#include "command.h"
#include "version.h"

namespace larosa {
namespace {

using Json = nlohmann::ordered_json;

/// Of the bandwidth measured in the same repetition.
double bandwidth_share(double bytes, const std::vector<double>& seconds,
                       const std::vector<double>& bandwidth) {
  std::vector<double> gbs;
  for (double s : seconds) gbs.push_back(bytes * 1e-9 / s);
  return median_ratio(gbs, bandwidth);
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double deviation(const std::vector<double>& values) {
  double sum = 0;
  for (double v : values) sum += (v - mean(values)) * (v - mean(values));
  return values.size() > 1 ? std::sqrt(sum / static_cast<double>(values.size() - 1)) : 0;
}

/// Coefficient of variation over the prompts: of their medians, so that one slow repetition is not a
/// prompt's.
double prompt_variation(const std::vector<double>& rates, int64_t prompts) {
  std::vector<std::vector<double>> of_prompt(static_cast<size_t>(prompts));
  for (size_t i = 0; i < rates.size(); ++i) of_prompt[i % of_prompt.size()].push_back(rates[i]);
  std::vector<double> medians;
  for (const std::vector<double>& r : of_prompt) medians.push_back(median(r));
  return deviation(medians) / mean(medians);
}

/// The first row of the same test that `like` accepts; `row` itself if there is none.
const Row& find_row(const Report& report, const Row& row, const std::function<bool(const Row&)>& like) {
  for (const Row& other : report.rows) {
    if (other.test() == row.test() && like(other)) return other;
  }
  return row;
}

/// What says which measurement a row or an operation belongs to.
Json identity(const Report& report, const Row& row) {
  return {{"version", LAROSA_VERSION_TEXT},
          {"backend", row.backend},
          {"model", report.name},
          {"model_size", report.bytes},
          {"model_n_params", report.parameters},
          {"n_threads", row.threads},
          {"method", row.method},
          {"sparsity", row.sparsity},
          {"test", row.test()},
          {"n_depth", row.depth},
          {"n_tokens", row.tokens}};
}

Json row_json(const Report& report, const Row& row) {
  std::vector<double> rates;
  for (double s : row.seconds) rates.push_back(static_cast<double>(row.tokens) / s);
  const Row& dense = find_row(report, row, [&](const Row& r) { return r.dense && r.threads == row.threads; });
  const Row& first_threads = find_row(
      report, row, [&](const Row& r) { return r.method == row.method && r.sparsity == row.sparsity; });
  Json json = identity(report, row);
  json.update({{"avg_ts", mean(rates)},
               {"stddev_ts", deviation(rates)},
               {"median_seconds", median(row.seconds)},
               {"speedup", median_ratio(dense.seconds, row.seconds)},
               {"thread_speedup", median_ratio(first_threads.seconds, row.seconds)},
               {"read_bandwidth_gbs", median(row.bandwidth)}});
  if (row.bytes > 0) {
    json["bytes_per_token"] = row.bytes;
    json["gbs"] = row.bytes * mean(rates) * 1e-9;
    json["bandwidth_share"] =
        bandwidth_share(row.bytes * static_cast<double>(row.tokens), row.seconds, row.bandwidth);
    json["ideal_speedup"] = row.dense_bytes / row.bytes;
  }
  if (report.prompts > 0) {
    json["n_prompts"] = report.prompts;
    json["prompt_cv"] = prompt_variation(rates, report.prompts);
  }
  json["samples_ts"] = rates;
  return json;
}

/// The row's operations, "rest" (the decoder's own work and the clocks) and "token" (all of it).
std::vector<Json> operation_jsons(const Report& report, const Row& row) {
  std::vector<OperationRow> all = row.operations;
  OperationRow rest{"rest", 0, 0, row.seconds}, token{"token", 1, 0, row.seconds};
  token.calls = row.tokens;
  for (const OperationRow& o : row.operations) {
    for (size_t i = 0; i < rest.seconds.size(); ++i) rest.seconds[i] -= o.seconds[i];
    token.bytes += o.bytes;
  }
  all.push_back(rest);
  all.push_back(token);
  std::vector<Json> jsons;
  for (const OperationRow& o : all) {
    const double tokens = static_cast<double>(row.tokens), seconds = median(o.seconds);
    Json json = identity(report, row);
    json.update({{"operation", o.name},
                 {"calls_per_token", static_cast<double>(o.calls) / tokens},
                 {"us_per_token", seconds * 1e6 / tokens},
                 {"share", median_ratio(o.seconds, row.seconds)},
                 {"bytes_per_token", static_cast<double>(o.bytes) / tokens},
                 {"read_bandwidth_gbs", median(row.bandwidth)}});
    if (o.calls > 0) json["us_per_call"] = seconds * 1e6 / static_cast<double>(o.calls);
    if (o.bytes > 0) {
      json["gbs"] = static_cast<double>(o.bytes) * 1e-9 / seconds;
      json["bandwidth_share"] = bandwidth_share(static_cast<double>(o.bytes), o.seconds, row.bandwidth);
    }
    jsons.push_back(json);
  }
  return jsons;
}

/// A column of a Markdown table. A cell is `scale · row[key]` with `digits`, or the text; empty if absent.
struct Column {
  const char* head;
  const char* key;
  int digits = -1;  // -1: text
  double scale = 1;
  const char* unit = "";
};

constexpr Column kRowColumns[] = {{"model", "model"},
                                  {"size", "model_size", 2, 1 / 1073741824.0, " GiB"},
                                  {"params", "params"},
                                  {"threads", "n_threads", 0},
                                  {"sparsity", "sparsity", 1, 100, " %"},
                                  {"test", "test"},
                                  {"t/s", "rate"},
                                  {"MB/token", "bytes_per_token", 1, 1e-6},
                                  {"GB/s", "gbs", 2},
                                  {"of bandwidth", "bandwidth_share", 1, 100, " %"},
                                  {"x dense", "speedup", 3},
                                  {"ideal", "ideal_speedup", 3},
                                  {"x threads", "thread_speedup", 3},
                                  {"CV over prompts", "prompt_cv", 2, 100, " %"}};
constexpr Column kOperationColumns[] = {{"operation", "operation"},
                                        {"calls/token", "calls_per_token", 2},
                                        {"us/call", "us_per_call", 2},
                                        {"us/token", "us_per_token", 1},
                                        {"share", "share", 1, 100, " %"},
                                        {"MB/token", "bytes_per_token", 3, 1e-6},
                                        {"GB/s", "gbs", 2},
                                        {"of bandwidth", "bandwidth_share", 1, 100, " %"}};

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string cell(const Column& column, const Json& row) {
  const auto value = row.find(column.key);
  if (value == row.end()) return "";
  if (column.digits < 0) return value->get<std::string>();
  return fixed(column.scale * value->get<double>(), column.digits) + column.unit;
}

void print_table(std::span<const Column> columns, const std::vector<Json>& rows) {
  std::string head = "|", line = "|";
  for (const Column& c : columns) {
    const bool text = c.digits < 0 && std::string(c.head) != "t/s";
    head += std::string(" ") + c.head + " |";
    line += text ? "---|" : "--:|";
  }
  std::printf("%s\n%s\n", head.c_str(), line.c_str());
  for (const Json& row : rows) {
    std::string text = "|";
    for (const Column& c : columns) text += " " + cell(c, row) + " |";
    std::printf("%s\n", text.c_str());
  }
}

void print_md(const Report& report) {
  std::string last;
  for (const Row& row : report.rows) {
    if (row.backend == last) continue;
    last = row.backend;
    std::printf("%s; read bandwidth %.2f GB/s (median of %zu)\n", row.backend.c_str(), median(row.bandwidth),
                row.bandwidth.size());
  }
  if (!report.operations) {
    std::vector<Json> rows;
    bool sweep = false;
    for (const Row& row : report.rows) {
      Json json = row_json(report, row);
      json["params"] = short_count(report.parameters);
      json["rate"] = fixed(json["avg_ts"], 2) + " ± " + fixed(json["stddev_ts"], 2);
      rows.push_back(json);
      sweep |= row.threads != report.rows[0].threads;
    }
    std::vector<Column> columns;
    for (const Column& c : kRowColumns) {
      const std::string key = c.key;
      if (key == "thread_speedup" ? sweep : key == "prompt_cv" ? report.prompts > 0 : true)
        columns.push_back(c);
    }
    std::printf("\n");
    print_table(columns, rows);
    return;
  }
  for (const Row& row : report.rows) {
    std::printf("\n%s, %s, %.1f %% sparse, %s, %d thread%s\n\n", report.name.c_str(), row.method.c_str(),
                100 * row.sparsity, row.test().c_str(), row.threads, row.threads > 1 ? "s" : "");
    print_table(kOperationColumns, operation_jsons(report, row));
  }
}

void print_csv(const std::vector<Json>& rows) {
  const auto widest = std::max_element(rows.begin(), rows.end(),
                                       [](const Json& a, const Json& b) { return a.size() < b.size(); });
  const auto line = [&](const std::function<std::string(const std::string&)>& field) {
    std::string text;
    for (const auto& [key, value] : widest->items()) {
      if (!value.is_array()) text += (text.empty() ? "" : ",") + field(key);
    }
    std::printf("%s\n", text.c_str());
  };
  line([](const std::string& key) { return key; });
  for (const Json& row : rows)
    line([&](const std::string& key) { return row.contains(key) ? row[key].dump() : std::string(); });
}

}  // namespace

std::string Row::test() const {
  const std::string name = (prompt ? "pp" : "tg") + std::to_string(tokens);
  return depth > 0 ? name + " @ d" + std::to_string(depth) : name;
}

std::string short_count(int64_t n) {
  const double v = static_cast<double>(n);
  return n >= 1000000000 ? fixed(v * 1e-9, 2) + "B" : fixed(v * 1e-6, 2) + "M";
}

void print(const Report& report, const std::string& format) {
  if (format == "md") return print_md(report);
  std::vector<Json> rows;
  for (const Row& row : report.rows) {
    if (report.operations) {
      for (Json& json : operation_jsons(report, row)) rows.push_back(std::move(json));
    } else {
      rows.push_back(row_json(report, row));
    }
  }
  if (format == "csv") return print_csv(rows);
  std::printf("%s\n", json_text(rows).c_str());
}

}  // namespace larosa
