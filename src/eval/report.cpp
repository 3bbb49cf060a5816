#include "eval/report.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "base/error.h"
#include "eval/plot.h"
#include "eval/report_assets.h"
#include "eval/results.h"
#include "eval/sweep.h"
#include "io/files.h"
#include "io/json.h"

namespace larosa {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), pattern, value);
  return text;
}
std::string percent(double share) {
  return short_number(100 * share) + " %";
}
/// A share in per cent with one digit, without the sign: for cells of a heat map.
std::string percent_digit(double share) {
  return format("%.1f", 100 * share);
}
std::string two_digits(double value) {
  return format("%.2g", value);
}
std::string row_name(const std::string& method, double sparsity) {
  return method + " " + percent(sparsity);
}
std::string megabytes(double bytes) {
  return std::isfinite(bytes) ? format("%.2f", bytes / 1e6) : "–";
}
std::string or_dash(double value, const char* pattern) {
  return std::isfinite(value) ? format(pattern, value) : "–";
}

/// A name as the first cell of a row: variants of a method may break behind : , and =, so that narrow pages
/// show all of them.
std::string first_cell(const std::string& name) {
  std::string html;
  for (const char c : name) {
    html += escaped(std::string(1, c));
    if (c == ':' || c == ',' || c == '=') html += "<wbr>";
  }
  return name.find(':') == std::string::npos ? html : "<span class=\"variant\">" + html + "</span>";
}

/// A table of the page. Cells are HTML; `key` sorts a cell where its text would not.
struct Table {
  struct Cell {
    std::string html;
    double key = kMissing;
  };
  std::vector<std::string> head;
  struct Row {
    int style;
    std::vector<Cell> cells;
  };
  std::vector<Row> rows;

  std::string html(const std::string& name) const {
    std::string out = "<div class=\"table\" tabindex=\"0\" role=\"region\" aria-label=\"" + escaped(name) +
                      "\"><table>\n<thead><tr>";
    for (const std::string& h : head) out += "<th scope=\"col\">" + escaped(h) + "</th>";
    out += "</tr></thead>\n<tbody>\n";
    for (const Row& row : rows) {
      out += "<tr class=\"m" + std::to_string(row.style) + "\">";
      for (const Cell& cell : row.cells) {
        out += "<td" + (std::isfinite(cell.key) ? " data-v=\"" + format("%.9g", cell.key) + "\"" : "") + ">" +
               cell.html + "</td>";
      }
      out += "</tr>\n";
    }
    return out + "</tbody>\n</table></div>\n";
  }
};

Table::Cell number(double value, const char* pattern) {
  return {or_dash(value, pattern), value};
}
Table::Cell with_error(double value, double error, const char* pattern) {
  if (!std::isfinite(value)) return {"–"};
  return {format(pattern, value) +
              (std::isfinite(error) ? " <small>±" + format(pattern, error) + "</small>" : ""),
          value};
}

/// A text in a mode: figures are drawn for each.
struct View {
  std::string text;
  double dense_prompt;
  std::string mode() const {
    return dense_prompt == 0 ? "every token sparse"
                             : "first " + percent(dense_prompt) + " of each window dense, not scored";
  }
  std::string label() const { return text + ", " + mode(); }
};

template <class Value>
void add_new(std::vector<Value>& all, const Value& value) {
  if (std::find(all.begin(), all.end(), value) == all.end()) all.push_back(value);
}

class Report {
 public:
  explicit Report(const std::string& dir) : dir_(dir) {
    const std::string results = (dir_ / kResultsFile).string(), layers = (dir_ / kLayersFile).string();
    state_ = read_json((dir_ / kSweepFile).string());
    if (fs::exists(results)) rows_ = results_from_csv(read_file(results), results);
    if (fs::exists(layers)) layers_ = layers_from_csv(read_file(layers), layers);
    for (const ResultRow& row : rows_) {
      if (row.method != "dense") add_new(methods_, row.method);
      if (row.method != "dense" && !row.extra) add_new(sparsities_, row.sparsity);
      if (std::none_of(views_.begin(), views_.end(), [&](const View& v) { return in(v, row); }))
        views_.push_back({row.text, row.dense_prompt});
    }
    std::sort(sparsities_.begin(), sparsities_.end());
    percent_ = state_.at("job").at("ppl_percent").get<double>();
    if (!(percent_ > 0)) percent_ = 1;
  }

  void write() {
    plots_.clear();
    const std::map<std::string, std::string> parts = {
        {"page_css", kReportPageCss},
        {"plot_css", kReportPlotCss},
        {"script", kReportScript},
        {"name", escaped(fact("name"))},
        {"summary", summary()},
        {"headline", headline()},
        {"text_options", options([](const View& v) { return std::pair(v.text, v.text); })},
        {"mode_options",
         options([](const View& v) { return std::pair(format("%g", v.dense_prompt), v.mode()); })},
        {"method_boxes", method_boxes()},
        {"ppl_name", "PPL-" + format("%g", percent_) + "&thinsp;%"},
        {"ppl_percent", format("%g", percent_)},
        {"overview", figures("", &Report::overview)},
        {"curves", figures("perplexity", &Report::curves)},
        {"pareto", figures("pareto", &Report::pareto)},
        {"divergence", figures("divergence", &Report::divergence)},
        {"share", figures("ppl-share", &Report::share)},
        {"sites", figures("sites", &Report::sites)},
        {"layers", layers()},
        {"speed", speed()},
        {"refused", refused()},
        {"rows", all_rows()},
        {"csv", url_encoded(results_to_csv(rows_))},
        {"conditions", conditions()}};
    const std::string page = filled(kReportPage, parts);
    const fs::path plots = dir_ / "plots";
    make_directories(plots.string());
    for (const auto& [name, svg] : plots_) write_file((plots / name).string(), standalone_svg(svg));
    write_file((dir_ / "report.html").string(), page);
  }

 private:
  struct Figure {
    std::string svg, table;
    bool wide = false;  // table below the plot
  };

  static bool in(const View& v, const ResultRow& row) {
    return row.text == v.text && row.dense_prompt == v.dense_prompt;
  }
  int style(const std::string& method) const {
    const auto found = std::find(methods_.begin(), methods_.end(), method);
    return found == methods_.end() ? -1 : static_cast<int>(found - methods_.begin());
  }
  std::string fact(const std::string& name) const {
    const Json& value = state_.at("facts").at(name);
    return value.is_string() ? value.get<std::string>() : value.dump();
  }

  /// Rows of a view that were measured, the dense one left out, by method and sparsity.
  std::vector<const ResultRow*> measured(const View& v, bool extras) const {
    std::vector<const ResultRow*> found;
    for (const ResultRow& row : rows_) {
      if (in(v, row) && row.method != "dense" && row.refused.empty() && (extras || !row.extra))
        found.push_back(&row);
    }
    return found;
  }
  const ResultRow* find(const View& v, const std::string& method, double sparsity) const {
    for (const ResultRow& row : rows_)
      if (in(v, row) && row.method == method && row.sparsity == sparsity) return &row;
    return nullptr;
  }
  double dense_ppl(const View& v) const {
    const ResultRow* row = find(v, "dense", 0);
    return row ? row->ppl : kMissing;
  }

  // -- parts of the page -------------------------------------------------------------------------------

  static std::string filled(const std::string& page, const std::map<std::string, std::string>& parts) {
    std::string out;
    size_t at = 0;
    for (size_t open = page.find("{{"); open != std::string::npos; open = page.find("{{", at)) {
      const size_t close = page.find("}}", open);
      CHECK(close != std::string::npos);
      out += page.substr(at, open - at) + parts.at(page.substr(open + 2, close - open - 2));
      at = close + 2;
    }
    return out + page.substr(at);
  }

  static std::string url_encoded(const std::string& text) {
    std::string out;
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      if (std::isalnum(byte) || std::string_view("-_.~,").find(c) != std::string_view::npos) {
        out += c;
      } else {
        char code[4];
        std::snprintf(code, sizeof(code), "%%%02X", byte);
        out += code;
      }
    }
    return out;
  }

  std::string options(const std::function<std::pair<std::string, std::string>(const View&)>& of) const {
    std::vector<std::pair<std::string, std::string>> all;
    for (const View& v : views_) add_new(all, of(v));
    std::string html;
    for (const auto& [value, name] : all)
      html += "<option value=\"" + escaped(value) + "\">" + escaped(name) + "</option>";
    return html;
  }

  std::string method_boxes() const {
    std::string html;
    for (const std::string& m : methods_)
      html += "<label><input type=\"checkbox\" checked value=\"m" + std::to_string(style(m)) + "\">" +
              escaped(m) + "</label>";
    return html;
  }

  std::string summary() const {
    const double parameters = state_.at("facts").at("parameters").get<double>();
    const size_t grid = (state_.at("job").at("methods").size() * state_.at("job").at("sparsity").size() + 1) *
                        state_.at("job").at("texts").size() * state_.at("job").at("dense_prompt").size();
    const auto done = std::count_if(rows_.begin(), rows_.end(), [](const ResultRow& r) { return !r.extra; });
    std::string text = format("%.1f M parameters, ", parameters / 1e6) + fact("layers") + " layers, " +
                       fact("weights") + "; " + fact("machine") + "; begun " + fact("date") + ".";
    if (static_cast<size_t>(done) < grid)
      text += " Not complete: " + std::to_string(done) + " of " + std::to_string(grid) +
              " rows of the grid are measured.";
    return escaped(text);
  }

  /// One sentence: who loses least in the middle of the grid.
  std::string headline() const {
    if (views_.empty() || sparsities_.empty()) return "";
    const double s = *std::min_element(sparsities_.begin(), sparsities_.end(), [](double a, double b) {
      return std::abs(a - 0.5) < std::abs(b - 0.5);
    });
    const ResultRow* best = least(views_[0], s);
    if (!best) return "";
    return "<p class=\"headline\">At " + percent(s) + " of the weight bytes unread, <b>" +
           escaped(best->method) + "</b> loses least on " + escaped(views_[0].label()) + ": perplexity " +
           format("%.2f", best->ppl) + ", dense " + format("%.2f", best->dense_ppl) + ".</p>";
  }

  const ResultRow* least(const View& v, double sparsity) const {
    const ResultRow* best = nullptr;
    for (const ResultRow* row : measured(v, false))
      if (row->sparsity == sparsity && (!best || row->ppl < best->ppl)) best = row;
    return best;
  }

  std::string figures(const std::string& name, Figure (Report::*draw)(const View&) const) {
    std::string html;
    for (const View& v : views_) {
      const Figure figure = (this->*draw)(v);
      if (figure.svg.empty() && figure.table.empty()) continue;
      if (!figure.svg.empty()) keep(name + "-" + v.text + "-" + format("%g", v.dense_prompt), figure.svg);
      html += "<figure data-text=\"" + escaped(v.text) + "\" data-mode=\"" + format("%g", v.dense_prompt) +
              "\">\n<figcaption>" + escaped(v.label()) + "</figcaption>\n" + pair(figure) + "</figure>\n";
    }
    return html.empty() ? "<p class=\"none\">Not measured.</p>" : html;
  }

  static std::string pair(const Figure& f) {
    if (f.svg.empty()) return f.table;
    return std::string("<div class=\"pair") + (f.wide ? " wide" : "") + "\">\n" + f.svg + f.table +
           "</div>\n";
  }

  /// Remembers a plot to write as a file.
  void keep(std::string name, const std::string& svg) {
    for (char& c : name)
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-') c = '_';
    std::string file = name + ".svg";
    for (int i = 2; plots_.contains(file); ++i) file = name + "-" + std::to_string(i) + ".svg";
    plots_[file] = svg;
  }

  // -- figures of one view -----------------------------------------------------------------------------

  Figure overview(const View& v) const {
    Table table;
    table.head = {"method"};
    for (const double s : sparsities_) table.head.push_back(percent(s));
    table.head.push_back("PPL-" + format("%g", percent_) + " %");
    for (const std::string& m : methods_) {
      auto& cells = table.rows.emplace_back(Table::Row{style(m), {{first_cell(m)}}}).cells;
      for (const double s : sparsities_) {
        const ResultRow* row = find(v, m, s);
        if (!row || !row->refused.empty()) {
          cells.push_back({row ? "<span title=\"" + escaped(row->refused) + "\">–</span>" : ""});
          continue;
        }
        const std::string ppl = format("%.2f", row->ppl);
        cells.push_back({(row == least(v, s) ? "<b>" + ppl + "</b>" : ppl) + " <small>" +
                             format("%+.1f %%", 100 * (row->ppl / row->dense_ppl - 1)) + "</small>",
                         row->ppl});
      }
      const auto [text, value] = share_of(v, m);
      cells.push_back({escaped(text), value});
    }
    auto& cells = table.rows.emplace_back(Table::Row{-1, {{"dense"}}}).cells;
    for (size_t i = 0; i <= sparsities_.size(); ++i)
      cells.push_back({i == 0 ? or_dash(dense_ppl(v), "%.2f") : ""});
    return {"", table.html("Perplexity, " + v.label())};
  }

  /// Lines of all methods, and the dense model as a level where `dense` is finite.
  std::vector<Series> lines(const View& v, double dense,
                            const std::function<Series::Point(const ResultRow&)>& point) const {
    std::vector<Series> all;
    for (const std::string& m : methods_) all.push_back({m, style(m), {}});
    for (const ResultRow* row : measured(v, true)) {
      const Series::Point p = point(*row);
      all[static_cast<size_t>(style(row->method))].points.push_back(p);
    }
    for (Series& s : all) {
      std::stable_sort(s.points.begin(), s.points.end(),
                       [](const Series::Point& a, const Series::Point& b) { return a.x < b.x; });
    }
    if (std::isfinite(dense)) all.push_back({"dense", -1, {{0, dense, ""}}});
    return all;
  }

  static std::string point_title(const ResultRow& row, const std::string& more) {
    return row.method + ", " + percent_digit(row.reached) + " %: " + more;
  }

  Figure curves(const View& v) const {
    LinePlot plot{
        "Perplexity against sparsity, " + v.label(), "weight bytes not read, %", "perplexity", true, {}};
    plot.series = lines(v, dense_ppl(v), [](const ResultRow& r) {
      return Series::Point{100 * r.reached, r.ppl, point_title(r, "perplexity " + short_number(r.ppl))};
    });
    Table table{{"method", "asked", "reached", "perplexity", "over dense"}, {}};
    for (const ResultRow* r : measured(v, true)) {
      table.rows.push_back(
          {style(r->method),
           {{first_cell(r->method)},
            {percent(r->sparsity), r->sparsity},
            {percent_digit(r->reached) + " %", r->reached},
            with_error(r->ppl, r->ppl_error, "%.2f"),
            {format("%+.2f %%", 100 * (r->ppl / r->dense_ppl - 1)), r->ppl / r->dense_ppl}}});
    }
    return {line_plot(plot), table.rows.empty() ? "" : table.html(plot.title)};
  }

  Figure pareto(const View& v) const {
    LinePlot plot{
        "Perplexity against all bytes per token, " + v.label(), "MB read per token", "perplexity", true, {}};
    plot.series = lines(v, dense_ppl(v), [](const ResultRow& r) {
      return Series::Point{
          r.total_bytes / 1e6, r.ppl,
          r.method + ", " + megabytes(r.total_bytes) + " MB: perplexity " + short_number(r.ppl)};
    });
    const auto rows = measured(v, true);
    const auto beaten = [&](const ResultRow& r) {
      return std::any_of(rows.begin(), rows.end(), [&](const ResultRow* o) {
        return o->total_bytes <= r.total_bytes && o->ppl <= r.ppl &&
               (o->total_bytes < r.total_bytes || o->ppl < r.ppl);
      });
    };
    Table table{{"method", "front", "asked", "all MB", "weights", "adapters", "perplexity"}, {}};
    for (const ResultRow* r : rows) {
      if (!std::isfinite(r->total_bytes)) continue;
      table.rows.push_back({style(r->method),
                            {{first_cell(r->method)},
                             {beaten(*r) ? "" : "●"},
                             {percent(r->sparsity), r->sparsity},
                             {megabytes(r->total_bytes), r->total_bytes},
                             {megabytes(r->weight_bytes), r->weight_bytes},
                             {megabytes(r->adapter_bytes), r->adapter_bytes},
                             number(r->ppl, "%.2f")}});
    }
    if (const ResultRow* d = find(v, "dense", 0)) {
      table.rows.push_back({-1,
                            {{"dense"},
                             {""},
                             {"0 %", 0},
                             {megabytes(d->total_bytes), d->total_bytes},
                             {megabytes(d->weight_bytes), d->weight_bytes},
                             {megabytes(0), 0},
                             number(d->ppl, "%.2f")}});
    }
    return {line_plot(plot), table.rows.empty() ? "" : table.html(plot.title)};
  }

  Figure divergence(const View& v) const {
    LinePlot plot{"KL divergence against sparsity, " + v.label(),
                  "weight bytes not read, %",
                  "KL divergence, nats",
                  true,
                  {}};
    plot.series = lines(v, kMissing, [](const ResultRow& r) {
      return Series::Point{100 * r.reached, r.kl, point_title(r, short_number(r.kl) + " nats")};
    });
    Table table{{"method", "asked", "KL divergence", "same top token"}, {}};
    for (const ResultRow* r : measured(v, true)) {
      if (!std::isfinite(r->kl)) continue;
      table.rows.push_back({style(r->method),
                            {{first_cell(r->method)},
                             {percent(r->sparsity), r->sparsity},
                             with_error(r->kl, r->kl_error, "%.4f"),
                             {percent_digit(r->same_top) + " %", r->same_top}}});
    }
    return {line_plot(plot), table.rows.empty() ? "" : table.html(plot.title)};
  }

  std::optional<Crossing> crossing(const View& v, const std::string& method) const {
    std::vector<Point> points;
    for (const ResultRow* row : measured(v, true))
      if (row->method == method) points.push_back({row->reached, row->ppl});
    if (points.empty() || !std::isfinite(dense_ppl(v))) return {};
    return ppl_crossing(points, dense_ppl(v), percent_ / 100);
  }
  /// PPL-p % of a method as text and as what sorts it.
  std::pair<std::string, double> share_of(const View& v, const std::string& method) const {
    const auto c = crossing(v, method);
    if (!c) return {"–", kMissing};
    if (!c->between) return {"> " + percent_digit(c->high) + " %", c->high};
    return {percent_digit(*c->between) + " %", *c->between};
  }

  Figure share(const View& v) const {
    const std::string name = "PPL-" + format("%g", percent_) + " %";
    std::vector<Bar> bars;
    Table table{{"method", name, "measured below", "and above"}, {}};
    std::vector<std::string> order = methods_;
    std::stable_sort(order.begin(), order.end(), [&](const std::string& a, const std::string& b) {
      const double x = share_of(v, a).second, y = share_of(v, b).second;
      return std::isfinite(x) && (!std::isfinite(y) || x > y);
    });
    for (const std::string& m : order) {
      const auto c = crossing(v, m);
      if (!c) continue;
      const auto [text, value] = share_of(v, m);
      bars.push_back({m, style(m), 100 * value, text});
      table.rows.push_back({style(m),
                            {{first_cell(m)},
                             {escaped(text), value},
                             {c->low > 0 ? percent_digit(c->low) + " %" : "dense", c->low},
                             {c->between ? percent_digit(c->high) + " %" : "–", c->high}}});
    }
    const std::string title = name + " sparsity, " + v.label();
    return {bar_plot(title, "weight bytes not read, %", bars), table.rows.empty() ? "" : table.html(title)};
  }

  Figure sites(const View& v) const {
    HeatMap map;
    map.title = "Sparsity reached per site, " + v.label();
    map.columns = {"h1", "h2", "h3", "h4", "bytes"};
    map.low = 0, map.high = 1;
    map.text = percent_digit;
    Table table{{"method", "asked", "reached", "off by", "h1", "h2", "h3", "h4"}, {}};
    for (const ResultRow* r : measured(v, false)) {
      std::vector<double> values(r->site.begin(), r->site.end());
      values.push_back(r->reached);
      map.rows.push_back({row_name(r->method, r->sparsity), style(r->method), values});
      auto& cells =
          table.rows
              .emplace_back(Table::Row{
                  style(r->method),
                  {{first_cell(r->method)},
                   {percent(r->sparsity), r->sparsity},
                   {percent_digit(r->reached) + " %", r->reached},
                   {format("%+.2f", 100 * (r->reached - r->sparsity)), std::abs(r->reached - r->sparsity)}}})
              .cells;
      for (const double s : r->site) cells.push_back({percent_digit(s), s});
    }
    return {heat_map(map), table.rows.empty() ? "" : table.html(map.title)};
  }

  // -- figures of the whole sweep ----------------------------------------------------------------------

  std::string layers() {
    HeatMap map;
    map.title = "KL divergence when one layer alone is thinned";
    map.log = true;
    map.text = two_digits;
    std::map<int64_t, size_t> column;
    for (const LayerRow& row : layers_) column.emplace(row.layer, 0);
    for (auto& [layer, index] : column) {
      index = map.columns.size();
      map.columns.push_back(std::to_string(layer));
    }
    for (const LayerRow& row : layers_) {
      const std::string name = row_name(row.method, row.sparsity);
      if (map.rows.empty() || map.rows.back().name != name)
        map.rows.push_back({name, style(row.method), std::vector<double>(column.size(), kMissing)});
      map.rows.back().values[column[row.layer]] = row.kl;
    }
    if (map.rows.empty()) return "<p class=\"none\">Not measured (--layers).</p>";
    Table table;
    table.head = {"layer"};
    table.head.insert(table.head.end(), map.columns.begin(), map.columns.end());
    for (const HeatMap::Row& row : map.rows) {
      auto& cells = table.rows.emplace_back(Table::Row{row.style, {{first_cell(row.name)}}}).cells;
      for (const double kl : row.values) cells.push_back(number(kl, "%.4f"));
    }
    const std::string svg = heat_map(map);
    keep("layers", svg);
    return "<figure>\n" + pair({svg, table.html(map.title), true}) + "</figure>\n";
  }

  std::string speed() {
    if (views_.empty()) return "<p class=\"none\">Not measured.</p>";
    const View& v = views_[0];
    LinePlot plot{"Tokens per second against sparsity", "weight bytes not read, %", "tokens/s", false, {}};
    const ResultRow* dense = find(v, "dense", 0);
    plot.series = lines(v, dense ? dense->speed : kMissing, [](const ResultRow& r) {
      return Series::Point{100 * r.reached, r.speed, point_title(r, short_number(r.speed) + " tokens/s")};
    });
    Table table{{"method", "asked", "tokens/s", "dense beside it", "ratio", "by bytes"}, {}};
    for (const ResultRow* r : measured(v, false)) {
      if (!std::isfinite(r->speed)) continue;
      table.rows.push_back({style(r->method),
                            {{first_cell(r->method)},
                             {percent(r->sparsity), r->sparsity},
                             number(r->speed, "%.1f"),
                             number(r->dense_speed, "%.1f"),
                             number(r->speed / r->dense_speed, "%.2f"),
                             number(r->dense_bytes / r->total_bytes, "%.2f")}});
    }
    if (table.rows.empty()) return "<p class=\"none\">Not measured.</p>";
    const std::string svg = line_plot(plot);
    keep("speed", svg);
    return "<figure>\n" + pair({svg, table.html(plot.title)}) + "</figure>\n";
  }

  std::string refused() const {
    std::set<std::string> reasons;
    std::string html;
    for (const ResultRow& row : rows_) {
      if (row.refused.empty()) continue;
      const std::string line = row.method + " at " + percent(row.sparsity) + ": " + row.refused;
      if (reasons.insert(line).second) html += "<li>" + escaped(line) + "</li>\n";
    }
    return html.empty() ? "" : "<p>Not offered:</p>\n<ul>\n" + html + "</ul>\n";
  }

  std::string all_rows() const {
    Table table{{"method", "form", "asked", "text", "dense prompt", "perplexity", "dense", "KL", "reached",
                 "weights MB", "all MB", "tokens/s", "sparsify s", "score s", "windows", "predictions"},
                {}};
    for (const ResultRow& r : rows_) {
      table.rows.push_back({style(r.method),
                            {{first_cell(r.method) + (r.extra ? " <small>extra</small>" : "")},
                             {escaped(r.form)},
                             {percent(r.sparsity), r.sparsity},
                             {escaped(r.text)},
                             {percent(r.dense_prompt), r.dense_prompt},
                             with_error(r.ppl, r.ppl_error, "%.3f"),
                             number(r.dense_ppl, "%.3f"),
                             with_error(r.kl, r.kl_error, "%.4f"),
                             {std::isfinite(r.reached) ? percent_digit(r.reached) + " %" : "–", r.reached},
                             {megabytes(r.weight_bytes), r.weight_bytes},
                             {megabytes(r.total_bytes), r.total_bytes},
                             number(r.speed, "%.1f"),
                             number(r.sparsify_seconds, "%.1f"),
                             number(r.seconds, "%.1f"),
                             number(r.windows, "%.0f"),
                             number(r.predictions, "%.0f")}});
    }
    return table.html("All rows");
  }

  std::string conditions() const {
    const Json& job = state_.at("job");
    std::string texts;
    for (const Json& t : job.at("texts"))
      texts += (texts.empty() ? "" : "; ") + t.at("name").get<std::string>() + ", " + t.at("tokens").dump() +
               " tokens";
    const Json& calibration = job.at("calibration");
    const int64_t chunks = job.at("chunks").get<int64_t>();
    const std::pair<const char*, std::string> lines[] = {
        {"Command", fact("command")},
        {"Machine", fact("machine")},
        {"Begun", fact("date")},
        {"Model", fact("name") + ", fingerprint " + job.at("model").get<std::string>()},
        {"Texts", texts},
        {"Protocol", job.at("protocol").get<std::string>() + ", context " + job.at("context").dump() +
                         (chunks > 0 ? ", the first " + std::to_string(chunks) + " windows" : "")},
        {"Calibration", calibration.at("tokens").get<int64_t>() == 0
                            ? "none"
                            : calibration.at("name").get<std::string>() + ", " +
                                  calibration.at("tokens").dump() + " tokens in windows of " +
                                  calibration.at("window").dump()},
        {"Products", job.at("products").get<std::string>()},
        {"Timing", job.at("speed_tokens").dump() + " tokens, median of three"}};
    std::string html = "<dl>\n";
    for (const auto& [name, value] : lines)
      html += "<dt>" + std::string(name) + "</dt><dd>" + escaped(value) + "</dd>\n";
    return html + "</dl>\n";
  }

  fs::path dir_;
  Json state_;
  std::vector<ResultRow> rows_;
  std::vector<LayerRow> layers_;
  std::vector<std::string> methods_;  // in the order of the rows
  std::vector<double> sparsities_;    // of the grid, ascending
  std::vector<View> views_;
  double percent_ = 1;  // p of PPL-p %
  std::map<std::string, std::string> plots_;
};

}  // namespace

void write_report(const std::string& dir) {
  const std::string state = (fs::path(dir) / kSweepFile).string();
  if (!fs::exists(state)) fail(dir, ": holds no ", kSweepFile, ", expected the directory of a sweep");
  try {
    Report(dir).write();
  } catch (const nlohmann::json::exception& e) {
    fail(state, ": ", e.what());
  }
}

}  // namespace larosa
