// Charts as HTML and SVG text, without scripts.
//
//   figure
//     figcaption     title, what the y axis shows
//     svg            as wide as the page: labels, dots and columns at percentages of it
//       svg          curves in a square of 1000 x 1000 that is stretched to the plot
//     legend
//
// So text, dots and strokes keep their size on every page width. Colours are CSS classes: the page
// defines them for light and dark.
#pragma once

#include <string>
#include <vector>

namespace bbb::tools {

// Text for an HTML or SVG element or a quoted attribute. Control characters become spaces.
std::string html_escape(const std::string& text);
// "0.00123", "12.3", "4,570,000": three significant digits; "-" if it is not finite.
std::string short_number(double value);

struct Point {
  double x = 0, y = 0;  // a y that is not finite is a gap
};

enum class Mark { Line, PaleLine, Dots, Rings };
struct Series {
  std::string name;   // for the legend and for pointing devices
  std::string color;  // CSS
  Mark mark = Mark::Line;
  std::vector<Point> points;
};

struct Range {
  double low = 0, high = 1;
};
// The range of the finite values above 0 of every series, widened by a margin: for a log scale.
Range log_range(const std::vector<Series>& series);

enum class Legend { Series, None };
struct ChartText {
  std::string title, y, x;  // x: the unit of the x axis, such as "step"
};
// Series on whole-numbered x and a logarithmic y axis. Values of 0 or less are gaps.
std::string line_chart(const ChartText& text, const Range& y, const std::vector<Series>& series,
                       Legend legend);

// A column for each x, in which the parts stand on each other, from 0.
struct Part {
  std::string name, color;
  std::vector<double> values;  // one a column, at least 0
};
std::string column_chart(const ChartText& text, const std::string& unit,
                         const std::vector<std::string>& columns, const std::vector<Part>& parts);
// One bar as wide as the page: the first value of every part, as shares of their sum.
std::string share_bar(const std::string& unit, const std::vector<Part>& parts);

// The colour of curve i of n, in an order that the eye follows: blue, violet, orange.
std::string ordered_color(size_t i, size_t n);
std::string ordered_legend(const std::string& first, const std::string& last);

}  // namespace bbb::tools
