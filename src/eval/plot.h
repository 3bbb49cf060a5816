// Plots as SVG text: lines with markers, bars, heat maps. Colours are classes of report/plot.css, so that one
// plot fits light and dark pages and paper; markers differ in shape, so that colour is not needed.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace larosa {

/// Escaped for text and attributes of HTML and SVG.
std::string escaped(const std::string& text);
/// A number for people: four significant digits without zeros at the end.
std::string short_number(double value);

struct Series {
  std::string name;
  int style = 0;  // colour and marker; −1: the dense model, a dashed level across the plot at its first point
  struct Point {
    double x, y;
    std::string title;  // shown when pointed at
  };
  std::vector<Point> points;
};

struct LinePlot {
  std::string title;  // for screen readers
  std::string x_label, y_label;
  bool log_y = false;
  std::vector<Series> series;
};
/// An <svg> element, empty when no series has a point. Points whose numbers are not finite, or not positive
/// on a logarithmic axis, are left out.
std::string line_plot(const LinePlot& plot);

struct Bar {
  std::string name;
  int style = 0;
  double value = 0;
  std::string label;  // behind the bar
};
/// Horizontal bars from 0, one below the other. Unfilled where value is not finite.
std::string bar_plot(const std::string& title, const std::string& x_label, const std::vector<Bar>& bars);

struct HeatMap {
  std::string title;
  std::vector<std::string> columns;
  struct Row {
    std::string name;
    int style = 0;
    std::vector<double> values;  // beside columns; NaN: no cell
  };
  std::vector<Row> rows;
  bool log = false;                            // colour by the logarithm
  std::optional<double> low, high;             // ends of the colours; nothing: the least and largest value
  std::string (*text)(double) = short_number;  // in the cells, where there is room, and beside the colours
};
std::string heat_map(const HeatMap& map);

/// The plot as a file of its own: with the style sheet inside.
std::string standalone_svg(const std::string& svg);

}  // namespace larosa
