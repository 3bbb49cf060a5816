#include "eval/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "eval/report_assets.h"

namespace larosa {
namespace {

// All plots are 420 units wide: on a phone of 360 pixels a unit is 0.8 of them, and 11 units of type stay
// legible.
constexpr double kLine = 15;    // from line to line
constexpr double kGlyph = 7.2;  // of a digit at the 13 units that a phone's style sheet asks for
constexpr int kColours = 8;
constexpr int kHeats = 9;

std::string fixed(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", value);
  return text;
}

std::string open_svg(const std::string& title, double height) {
  return "<svg class=\"plot\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 420 " + fixed(height) +
         "\" role=\"img\" aria-label=\"" + escaped(title) + "\">\n";
}

std::string text_at(double x, double y, const std::string& text, const std::string& classes,
                    const std::string& more = "") {
  return "<text x=\"" + fixed(x) + "\" y=\"" + fixed(y) + "\" class=\"" + classes + "\"" + more + ">" +
         escaped(text) + "</text>\n";
}

std::string rule(double x1, double y1, double x2, double y2, const std::string& classes) {
  return "<path class=\"" + classes + "\" d=\"M" + fixed(x1) + " " + fixed(y1) + "L" + fixed(x2) + " " +
         fixed(y2) + "\"/>\n";
}

/// At most `most` characters of UTF-8, by leaving out some in the middle: variants of a method differ at both
/// ends.
std::string cut(const std::string& text, size_t most) {
  std::vector<size_t> starts;
  for (size_t at = 0; at < text.size(); ++at)
    if ((static_cast<unsigned char>(text[at]) & 0xc0) != 0x80) starts.push_back(at);
  if (starts.size() <= most) return text;
  const size_t front = most / 2, back = most - front - 1;
  return text.substr(0, starts[front]) + "…" + text.substr(starts[starts.size() - back]);
}

size_t longest(const std::vector<Series>& series) {
  size_t most = 0;
  for (const Series& s : series) most = std::max(most, s.name.size());
  return most;
}

std::string series_class(int style) {
  return style < 0 ? "dense" : "c" + std::to_string(style % kColours);
}

/// Outlines around (0, 0); the shape changes with the colour and once more when the colours begin anew.
std::string marker(double x, double y, int style) {
  static constexpr std::array kShapes = {
      "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",                                     // circle
      "M-3.6-3.6h7.2v7.2h-7.2z",                                                // square
      "M0-4.6L4.6 3.6h-9.2z",                                                   // triangle
      "M0-5L4.6 0L0 5L-4.6 0z",                                                 // diamond
      "M0 4.6L4.6-3.6h-9.2z",                                                   // triangle, down
      "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",                                  // plus
      "M0-5l1.5 3.4 3.6.3-2.7 2.4.9 3.6L0 2.8l-3.3 1.9.9-3.6-2.7-2.4 3.6-.3z",  // star
      "M-4.4 0l2.2-3.9h4.4L4.4 0L2.2 3.9h-4.4z"};                               // hexagon
  const auto shape = static_cast<size_t>(style % kColours + style / kColours) % kShapes.size();
  return "<path class=\"mark\" transform=\"translate(" + fixed(x) + " " + fixed(y) + ")\" d=\"" +
         kShapes[shape] + "\"/>";
}

/// Numbers for an axis, four to eight of them where the range allows it.
std::vector<double> ticks(double low, double high, bool log) {
  std::vector<double> found;
  if (log) {
    static const std::vector<double> kSets[] = {{1}, {1, 3}, {1, 2, 5}, {1, 1.5, 2, 3, 4, 5, 7}};
    for (const auto& set : kSets) {
      found.clear();
      const auto last = static_cast<int>(std::floor(std::log10(high)));
      for (auto power = static_cast<int>(std::floor(std::log10(low))); power <= last; ++power) {
        for (const double step : set) {
          const double tick = step * std::pow(10, power);
          if (tick >= low && tick <= high) found.push_back(tick);
        }
      }
      if (found.size() >= 4) return found;
    }
    found.clear();
  }
  const double raw = (high - low) / 7, power = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * power;
  for (const double nice : {5.0, 2.5, 2.0, 1.0})
    if (nice * power >= raw) step = nice * power;
  const auto first = static_cast<int64_t>(std::ceil(low / step - 1e-9));
  for (int64_t i = first; static_cast<double>(i) * step <= high + 1e-9 * step; ++i)
    found.push_back(static_cast<double>(i) * step);
  return found;
}

/// One axis: from numbers to the plot's units.
struct Scale {
  double low, high, from, to;
  bool log;

  Scale(std::vector<double> values, bool logarithmic, double first, double last)
      : low(1), high(2), from(first), to(last), log(logarithmic) {
    if (!values.empty()) {
      low = *std::min_element(values.begin(), values.end());
      high = *std::max_element(values.begin(), values.end());
    }
    if (log) {
      const double room = std::max(std::pow(high / low, 0.06), 1.02);
      low /= room, high *= room;
    } else {
      const double room = std::max({(high - low) * 0.06, std::abs(high) * 0.01, 1e-9});
      if (low >= 0)
        low = std::max(0.0, low - room);
      else
        low -= room;
      high += room;
    }
  }
  double at(double value) const {
    const double part = log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return from + part * (to - from);
  }
};

bool drawable(const Series::Point& p, bool log_y) {
  return std::isfinite(p.x) && std::isfinite(p.y) && (!log_y || p.y > 0);
}

std::string draw_series(const Series& s, const Scale& x, const Scale& y, bool log_y) {
  std::string line, marks;
  for (const Series::Point& p : s.points) {
    if (!drawable(p, log_y)) continue;
    const double px = x.at(p.x), py = y.at(p.y);
    line += (line.empty() ? "M" : "L") + fixed(px) + " " + fixed(py);
    if (s.style < 0) {
      marks += rule(x.from, py, x.to, py, "level");
      break;
    }
    marks += "<g><title>" + escaped(p.title) + "</title>" + marker(px, py, s.style) + "</g>\n";
  }
  if (marks.empty()) return "";
  const std::string dashed = s.style >= kColours ? " again" : "";
  return "<g class=\"series " + series_class(s.style) + dashed + " m" + std::to_string(s.style) + "\">\n" +
         (s.style < 0 ? "" : "<path class=\"line\" d=\"" + line + "\"/>\n") + marks + "</g>\n";
}

/// Columns of the legend: two unless a name is too long.
size_t legend_columns(const std::vector<Series>& series) {
  return longest(series) <= 24 ? 2 : 1;
}

/// Names with their markers from `top` down.
std::string legend(const std::vector<Series>& series, double top) {
  const size_t columns = legend_columns(series);
  std::string svg;
  for (size_t i = 0; i < series.size(); ++i) {
    const Series& s = series[i];
    const double x = 12 + 206 * static_cast<double>(i % columns);
    const size_t line = i / columns;
    const double y = top + kLine * static_cast<double>(line);
    svg += "<g class=\"series " + series_class(s.style) + " m" + std::to_string(s.style) + "\">";
    svg += s.style < 0 ? rule(x - 8, y, x + 8, y, "level") : marker(x, y, s.style);
    svg += text_at(x + 12, y + 4, cut(s.name, columns == 1 ? 50 : 24), "") + "</g>\n";
  }
  return svg;
}

std::string colour_key(double y, const std::string& low, const std::string& high) {
  std::string svg = text_at(96, y + 9, low, "end");
  for (int i = 0; i < kHeats; ++i)
    svg += "<rect class=\"q" + std::to_string(i) + "\" x=\"" + fixed(102 + 24 * i) + "\" y=\"" + fixed(y) +
           "\" width=\"24\" height=\"11\"/>\n";
  return svg + text_at(324, y + 9, high, "");
}

}  // namespace

std::string escaped(const std::string& text) {
  std::string safe;
  for (const char c : text) {
    if (c == '&')
      safe += "&amp;";
    else if (c == '<')
      safe += "&lt;";
    else if (c == '>')
      safe += "&gt;";
    else if (c == '"')
      safe += "&quot;";
    else if (static_cast<unsigned char>(c) < 0x20)
      safe += ' ';
    else
      safe += c;
  }
  return safe;
}

std::string short_number(double value) {
  char text[32];
  if (std::abs(value) >= 1e4 && std::abs(value) < 1e7) {
    std::snprintf(text, sizeof(text), "%.0f", value);
  } else {
    std::snprintf(text, sizeof(text), "%.4g", value);
  }
  return text;
}

std::string line_plot(const LinePlot& plot) {
  constexpr double kLeft = 52, kRight = 410, kTop = 20, kBottom = 236;
  std::vector<double> xs, ys;
  std::vector<Series> shown;
  for (const Series& s : plot.series) {
    bool any = false;
    for (const Series::Point& p : s.points) {
      if (!drawable(p, plot.log_y)) continue;
      any = true;
      ys.push_back(p.y);
      if (s.style >= 0) xs.push_back(p.x);
    }
    if (any) shown.push_back(s);
  }
  if (xs.empty()) return "";
  const Scale x(xs, false, kLeft, kRight), y(ys, plot.log_y, kBottom, kTop);
  const double legend_top = kBottom + 46;
  const size_t columns = legend_columns(shown), lines = (shown.size() + columns - 1) / columns;
  std::string svg = open_svg(plot.title, legend_top + kLine * static_cast<double>(lines));
  for (const double t : ticks(y.low, y.high, y.log)) {
    svg += rule(kLeft, y.at(t), kRight, y.at(t), "grid");
    svg += text_at(kLeft - 5, y.at(t) + 4, short_number(t), "end");
  }
  for (const double t : ticks(x.low, x.high, false)) {
    svg += rule(x.at(t), kBottom, x.at(t), kBottom + 4, "axis");
    svg += text_at(x.at(t), kBottom + 16, short_number(t), "mid");
  }
  svg += rule(kLeft, kBottom, kRight, kBottom, "axis");
  svg += text_at((kLeft + kRight) / 2, kBottom + 31, plot.x_label, "mid label");
  svg += text_at(4, 11, plot.y_label + (plot.log_y ? " (logarithmic)" : ""), "label");
  for (const Series& s : shown) svg += draw_series(s, x, y, plot.log_y);
  return svg + legend(shown, legend_top) + "</svg>\n";
}

std::string bar_plot(const std::string& title, const std::string& x_label, const std::vector<Bar>& bars) {
  constexpr double kLeft = 150, kRight = 330, kRow = 20, kTop = 6;
  if (bars.empty()) return "";
  double most = 0;
  for (const Bar& bar : bars)
    if (std::isfinite(bar.value)) most = std::max(most, bar.value);
  if (most <= 0) most = 1;
  const double bottom = kTop + kRow * static_cast<double>(bars.size());
  std::string svg = open_svg(title, bottom + 24);
  for (size_t i = 0; i < bars.size(); ++i) {
    const Bar& bar = bars[i];
    const double y = kTop + kRow * static_cast<double>(i);
    const double length = std::isfinite(bar.value) ? bar.value / most * (kRight - kLeft) : 0;
    svg += "<g class=\"series " + series_class(bar.style) + " m" + std::to_string(bar.style) + "\">\n";
    svg += text_at(kLeft - 16, y + 14, cut(bar.name, 18), "end");
    if (bar.style >= 0) svg += marker(kLeft - 7, y + 10, bar.style) + "\n";
    svg += "<rect class=\"bar\" x=\"" + fixed(kLeft) + "\" y=\"" + fixed(y + 3) + "\" width=\"" +
           fixed(length) + "\" height=\"14\"/>\n";
    svg += text_at(kLeft + length + 5, y + 14, bar.label, "") + "</g>\n";
  }
  svg += rule(kLeft, kTop, kLeft, bottom, "axis");
  return svg + text_at(kLeft, bottom + 16, x_label, "label") + "</svg>\n";
}

std::string heat_map(const HeatMap& map) {
  constexpr double kLeft = 150, kRight = 416, kRow = 16, kTop = 18;
  double low = std::numeric_limits<double>::infinity(), high = -low;
  const auto drawn = [&](double v) { return std::isfinite(v) && (!map.log || v > 0); };
  for (const HeatMap::Row& row : map.rows) {
    for (const double v : row.values)
      if (drawn(v)) low = std::min(low, v), high = std::max(high, v);
  }
  if (!(low <= high)) return "";
  low = map.low.value_or(low), high = map.high.value_or(high);
  const auto heat = [&](double v) {
    const double range = map.log ? std::log(high / low) : high - low;
    const double part = range > 0 ? (map.log ? std::log(v / low) : v - low) / range : 0;
    return std::to_string(std::clamp(static_cast<int>(part * kHeats), 0, kHeats - 1));
  };
  size_t longest_text = 0;
  for (const HeatMap::Row& row : map.rows) {
    for (const double v : row.values)
      if (drawn(v)) longest_text = std::max(longest_text, map.text(v).size());
  }
  const double cell = (kRight - kLeft) / static_cast<double>(map.columns.size());
  const double bottom = kTop + kRow * static_cast<double>(map.rows.size());
  std::string svg = open_svg(map.title, bottom + 26);
  const auto every = static_cast<size_t>(std::ceil(22 / cell));  // columns from name to name
  for (size_t c = 0; c < map.columns.size(); c += every)
    svg += text_at(kLeft + cell * (static_cast<double>(c) + 0.5), kTop - 6, map.columns[c], "mid");
  for (size_t r = 0; r < map.rows.size(); ++r) {
    const HeatMap::Row& row = map.rows[r];
    const double y = kTop + kRow * static_cast<double>(r);
    svg += "<g class=\"m" + std::to_string(row.style) + "\">\n" +
           text_at(kLeft - 6, y + 12, cut(row.name, 19), "end");
    for (size_t c = 0; c < row.values.size() && c < map.columns.size(); ++c) {
      const double v = row.values[c], x = kLeft + cell * static_cast<double>(c);
      if (!drawn(v)) continue;
      svg += "<rect class=\"q" + heat(v) + "\" x=\"" + fixed(x) + "\" y=\"" + fixed(y) + "\" width=\"" +
             fixed(cell) + "\" height=\"" + fixed(kRow) + "\"><title>" +
             escaped(row.name + ", " + map.columns[c] + ": " + map.text(v)) + "</title></rect>\n";
      if (cell >= kGlyph * static_cast<double>(longest_text))
        svg += text_at(x + cell / 2, y + 12, map.text(v), "mid on" + heat(v));
    }
    svg += "</g>\n";
  }
  return svg + colour_key(bottom + 8, map.text(low), map.text(high)) + "</svg>\n";
}

std::string standalone_svg(const std::string& svg) {
  const size_t end = svg.find('>') + 1;
  return svg.substr(0, end) + "\n<style>\n" + kReportPlotCss + "</style>\n" + svg.substr(end);
}

}  // namespace larosa
