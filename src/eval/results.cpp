#include "eval/results.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>

#include "base/error.h"

namespace larosa {
namespace {

/// A column: its name and where its value stands in a row.
template <class Row>
struct Column {
  const char* name;
  std::function<std::string(const Row&)> write;
  std::function<bool(const std::string&, Row&)> read;  // false: not a value
};

std::string number_text(double value) {
  if (std::isnan(value)) return "";
  char text[32];
  const auto end = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, end.ptr);
}

bool number_of(const std::string& text, double& value) {
  value = kMissing;
  if (text.empty()) return true;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  return end.ec == std::errc() && end.ptr == text.data() + text.size() && std::isfinite(value);
}

template <class Row, class Get>
Column<Row> number_column(const char* name, Get get) {
  return {name,
          [get](const Row& row) { return number_text(static_cast<double>(get(const_cast<Row&>(row)))); },
          [get](const std::string& text, Row& row) {
            double value = 0;
            if (!number_of(text, value)) return false;
            get(row) = static_cast<std::remove_reference_t<decltype(get(row))>>(value);
            return true;
          }};
}

template <class Row>
Column<Row> column(const char* name, std::string Row::*field) {
  return {name, [field](const Row& row) { return row.*field; },
          [field](const std::string& text, Row& row) {
            row.*field = text;
            return true;
          }};
}

template <class Row>
Column<Row> column(const char* name, double Row::*field) {
  return number_column<Row>(name, [field](Row& row) -> double& { return row.*field; });
}

Column<ResultRow> site_column(const char* name, size_t site) {
  return number_column<ResultRow>(name, [site](ResultRow& row) -> double& { return row.site[site]; });
}

const std::vector<Column<ResultRow>>& result_columns() {
  using R = ResultRow;
  static const std::vector<Column<R>> columns = {
      column("method", &R::method),
      column("form", &R::form),
      column("sparsity", &R::sparsity),
      {"extra", [](const R& row) { return std::string(row.extra ? "1" : "0"); },
       [](const std::string& text, R& row) {
         row.extra = text == "1";
         return text == "0" || text == "1";
       }},
      column("text", &R::text),
      column("dense_prompt", &R::dense_prompt),
      column("ppl", &R::ppl),
      column("ppl_error", &R::ppl_error),
      column("dense_ppl", &R::dense_ppl),
      column("kl", &R::kl),
      column("kl_error", &R::kl_error),
      column("same_top", &R::same_top),
      column("sparsity_reached", &R::reached),
      site_column("h1", 0),
      site_column("h2", 1),
      site_column("h3", 2),
      site_column("h4", 3),
      column("weight_bytes", &R::weight_bytes),
      column("adapter_bytes", &R::adapter_bytes),
      column("total_bytes", &R::total_bytes),
      column("dense_bytes", &R::dense_bytes),
      column("tokens_per_second", &R::speed),
      column("dense_tokens_per_second", &R::dense_speed),
      column("sparsify_seconds", &R::sparsify_seconds),
      column("seconds", &R::seconds),
      column("windows", &R::windows),
      column("predictions", &R::predictions),
      column("refused", &R::refused)};
  return columns;
}

const std::vector<Column<LayerRow>>& layer_columns() {
  using R = LayerRow;
  static const std::vector<Column<R>> columns = {
      column("method", &R::method),
      column("sparsity", &R::sparsity),
      {"layer", [](const R& row) { return std::to_string(row.layer); },
       [](const std::string& text, R& row) {
         const auto end = std::from_chars(text.data(), text.data() + text.size(), row.layer);
         return end.ec == std::errc() && end.ptr == text.data() + text.size() && row.layer >= 0;
       }},
      column("kl", &R::kl),
      column("kl_error", &R::kl_error)};
  return columns;
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

/// The fields of the next line of `text`, from `at`, which moves behind it.
std::vector<std::string> csv_line(const std::string& text, size_t& at) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (quoted) {
      if (c != '"') {
        fields.back() += c;
      } else if (at + 1 < text.size() && text[at + 1] == '"') {
        fields.back() += text[++at];
      } else {
        quoted = false;
      }
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      fields.emplace_back();
    } else if (c == '\n') {
      ++at;
      break;
    } else if (c != '\r') {
      fields.back() += c;
    }
  }
  return fields;
}

template <class Row>
std::string to_csv(std::span<const Row> rows, const std::vector<Column<Row>>& columns) {
  std::string text;
  for (const auto& c : columns) text += (text.empty() ? "" : ",") + std::string(c.name);
  text += '\n';
  for (const Row& row : rows) {
    for (const auto& c : columns) text += (&c == columns.data() ? "" : ",") + csv_field(c.write(row));
    text += '\n';
  }
  return text;
}

template <class Row>
std::vector<Row> from_csv(const std::string& text, const std::string& source,
                          const std::vector<Column<Row>>& columns) {
  size_t at = 0;
  std::vector<const Column<Row>*> order;
  for (const std::string& name : csv_line(text, at)) {
    const auto found =
        std::find_if(columns.begin(), columns.end(), [&](const auto& c) { return name == c.name; });
    if (found == columns.end()) fail(source, ": line 1: column \"", name, "\" is unknown");
    if (std::find(order.begin(), order.end(), &*found) != order.end())
      fail(source, ": line 1: column \"", name, "\" stands there twice");
    order.push_back(&*found);
  }
  if (order.size() != columns.size())
    fail(source, ": line 1: ", order.size(), " columns, expected ", columns.size());
  std::vector<Row> rows;
  for (int64_t line = 2; at < text.size(); ++line) {
    const auto fields = csv_line(text, at);
    if (fields.size() != order.size())
      fail(source, ": line ", line, ": ", fields.size(), " fields, expected ", order.size());
    Row& row = rows.emplace_back();
    for (size_t i = 0; i < fields.size(); ++i) {
      if (!order[i]->read(fields[i], row))
        fail(source, ": line ", line, ": column ", order[i]->name, " is \"", fields[i],
             "\", expected a number");
    }
  }
  return rows;
}

}  // namespace

std::string results_to_csv(std::span<const ResultRow> rows) {
  return to_csv(rows, result_columns());
}
std::vector<ResultRow> results_from_csv(const std::string& text, const std::string& source) {
  return from_csv(text, source, result_columns());
}
std::string layers_to_csv(std::span<const LayerRow> rows) {
  return to_csv(rows, layer_columns());
}
std::vector<LayerRow> layers_from_csv(const std::string& text, const std::string& source) {
  return from_csv(text, source, layer_columns());
}

Crossing ppl_crossing(std::vector<Point> points, double dense, double share) {
  std::sort(points.begin(), points.end(),
            [](const Point& a, const Point& b) { return a.sparsity < b.sparsity; });
  const double limit = std::log(dense * (1 + share));
  Crossing found{0, 0, {}};
  double below = std::log(dense);  // running maximum of log perplexity, at found.low
  for (const Point& p : points) {
    const double here = std::max(below, std::log(p.ppl));
    found.high = p.sparsity;
    if (here >= limit) {
      const double part = here > below ? (limit - below) / (here - below) : 0;
      found.between = found.low + part * (p.sparsity - found.low);
      return found;
    }
    found.low = p.sparsity;
    below = here;
  }
  return found;
}

}  // namespace larosa
