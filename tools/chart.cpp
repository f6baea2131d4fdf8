#include "tools/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>

namespace bbb::tools {

namespace {

constexpr double kSquare = 1000;  // side of the drawing that is stretched to the plot

bool drawable(double y) { return std::isfinite(y) && y > 0; }

// 1, 2 or 5 times a power of ten, at least `least`.
double round_step(double least) {
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  return 10 * power;
}

std::vector<double> linear_ticks(const Range& r, int most) {
  const double step = round_step((r.high - r.low) / most);
  std::vector<double> ticks;
  for (double i = std::ceil(r.low / step - 1e-9); i * step <= r.high + 1e-9 * step; ++i)
    ticks.push_back(i * step + 0.0);  // never -0
  return ticks;
}

// Powers of ten if there are enough of them, else 1, 2 and 5 times them, else evenly spaced values.
std::vector<double> log_ticks(const Range& r) {
  constexpr int kMost = 8;
  std::vector<double> powers, finer;
  for (int e = static_cast<int>(std::floor(std::log10(r.low))); std::pow(10, e) <= r.high; ++e)
    for (double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * std::pow(10, e);
      if (tick < r.low || tick > r.high) continue;
      finer.push_back(tick);
      if (factor == 1) powers.push_back(tick);
    }
  if (finer.size() < 3) return linear_ticks(r, 4);
  if (finer.size() <= kMost) return finer;
  const size_t every = (powers.size() + kMost - 1) / kMost;
  std::vector<double> ticks;
  for (size_t i = 0; i < powers.size(); i += every) ticks.push_back(powers[i]);
  return ticks;
}

// From values to parts of the plot, from its left and its top.
struct Axes {
  Range x, y;
  double across(double value) const { return (value - x.low) / (x.high - x.low); }
  double down(double value) const {
    return (std::log(y.high) - std::log(value)) / (std::log(y.high) - std::log(y.low));
  }
};

Range x_range(const std::vector<Series>& series) {
  Range r{0, 0};
  bool first = true;
  for (const Series& s : series)
    for (const Point& p : s.points) {
      r.low = first ? p.x : std::min(r.low, p.x);
      r.high = first ? p.x : std::max(r.high, p.x);
      first = false;
    }
  return r.low < r.high ? r : Range{r.low - 0.5, r.low + 0.5};
}

std::string figure_start(const ChartText& text) {
  return fmt::format("<figure>\n<figcaption><b>{}</b> <span>{}</span></figcaption>\n",
                     html_escape(text.title), html_escape(text.y));
}

std::string plot_start(const ChartText& text) {
  return fmt::format(
      "<svg class=\"plot\" role=\"img\" aria-label=\"{}\">\n<rect class=\"frame\" width=\"100%\" "
      "height=\"100%\"/>\n",
      html_escape(text.title + ", " + text.y));
}

std::string y_tick(double down, const std::string& label) {
  return fmt::format(
      "<line class=\"grid\" x1=\"0\" x2=\"100%\" y1=\"{0:.2f}%\" y2=\"{0:.2f}%\"/>"
      "<text class=\"y\" x=\"-7\" y=\"{0:.2f}%\" dy=\"4\">{1}</text>\n",
      100 * down, label);
}

std::string x_tick(double across, const std::string& label) {
  return fmt::format("<text class=\"x\" x=\"{:.2f}%\" y=\"100%\" dy=\"17\">{}</text>\n",
                     100 * across, html_escape(label));
}

std::string x_title(const std::string& title) {
  return fmt::format("<text class=\"x\" x=\"50%\" y=\"100%\" dy=\"34\">{}</text>\n",
                     html_escape(title));
}

std::string curve(const Series& s, const Axes& axes) {
  std::string path;
  bool pen_down = false;
  for (size_t i = 0; i < s.points.size(); ++i) {
    const Point& p = s.points[i];
    if (!drawable(p.y)) {
      pen_down = false;
      continue;
    }
    path += fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", kSquare * axes.across(p.x),
                        kSquare * axes.down(p.y));
    // A point without neighbours is a line of no length: its round ends show.
    if (!pen_down && (i + 1 == s.points.size() || !drawable(s.points[i + 1].y))) path += "h0";
    pen_down = true;
  }
  return fmt::format("<path class=\"{}\" d=\"{}\" stroke=\"{}\"><title>{}</title></path>\n",
                     s.mark == Mark::PaleLine ? "pale" : "line", path, s.color,
                     html_escape(s.name));
}

std::string dots(const Series& s, const Axes& axes) {
  std::string out;
  for (const Point& p : s.points)
    if (drawable(p.y))
      out += fmt::format(
          "<circle cx=\"{:.2f}%\" cy=\"{:.2f}%\" r=\"3.5\" {}><title>{}</title></circle>\n",
          100 * axes.across(p.x), 100 * axes.down(p.y),
          s.mark == Mark::Rings ? fmt::format("class=\"ring\" stroke=\"{}\"", s.color)
                                : fmt::format("fill=\"{}\"", s.color),
          html_escape(fmt::format("{}, {}: {}", s.name, p.x, short_number(p.y))));
  return out;
}

std::string legend_entry(const std::string& drawing, const std::string& name) {
  return fmt::format("<span><svg class=\"key\" aria-hidden=\"true\">{}</svg>{}</span>\n", drawing,
                     html_escape(name));
}

std::string key_of(const Series& s) {
  if (s.mark == Mark::Dots)
    return fmt::format("<circle cx=\"9\" cy=\"6\" r=\"4\" fill=\"{}\"/>", s.color);
  if (s.mark == Mark::Rings)
    return fmt::format("<circle class=\"ring\" cx=\"9\" cy=\"6\" r=\"3.5\" stroke=\"{}\"/>",
                       s.color);
  return fmt::format("<line x1=\"1\" x2=\"17\" y1=\"6\" y2=\"6\" class=\"{}\" stroke=\"{}\"/>",
                     s.mark == Mark::PaleLine ? "pale" : "line", s.color);
}

std::string box_of(const std::string& color) {
  return fmt::format("<rect x=\"3\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{}\"/>", color);
}

}  // namespace

std::string html_escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (c == '\'')
      out += "&#39;";
    else
      out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  }
  return out;
}

std::string short_number(double value) {
  if (!std::isfinite(value)) return "-";
  const std::string text = fmt::format("{:.3g}", value);
  if (std::abs(value) < 999.5 || std::abs(value) >= 1e12) return text;
  std::string digits = fmt::format("{:.0f}", std::stod(text));
  for (size_t i = digits.size(); i > 3 && std::isdigit(digits[i - 4]) != 0; i -= 3)
    digits.insert(i - 3, ",");
  return digits;
}

Range log_range(const std::vector<Series>& series) {
  double low = INFINITY, high = 0;
  for (const Series& s : series)
    for (const Point& p : s.points)
      if (drawable(p.y)) {
        low = std::min(low, p.y);
        high = std::max(high, p.y);
      }
  if (high == 0) return {0.1, 1};
  const double margin = std::max(std::pow(high / low, 0.06), 1.02);
  return {low / margin, high * margin};
}

std::string line_chart(const ChartText& text, const Range& y, const std::vector<Series>& series,
                       Legend legend) {
  const Axes axes{x_range(series), y};
  std::string out = figure_start(text) + plot_start(text);
  for (double tick : log_ticks(y)) out += y_tick(axes.down(tick), short_number(tick));
  for (double tick : linear_ticks(axes.x, 5))
    if (tick == std::round(tick)) out += x_tick(axes.across(tick), fmt::format("{:.0f}", tick));
  out += x_title(text.x);
  out += fmt::format("<svg viewBox=\"0 0 {0} {0}\" preserveAspectRatio=\"none\">\n", kSquare);
  for (const Series& s : series)
    if (s.mark == Mark::Line || s.mark == Mark::PaleLine) out += curve(s, axes);
  out += "</svg>\n";
  for (const Series& s : series)
    if (s.mark == Mark::Dots || s.mark == Mark::Rings) out += dots(s, axes);
  out += "</svg>\n";
  if (legend == Legend::Series) {
    out += "<div class=\"legend\">";
    for (const Series& s : series) out += legend_entry(key_of(s), s.name);
    out += "</div>\n";
  }
  return out + "</figure>\n";
}

std::string column_chart(const ChartText& text, const std::string& unit,
                         const std::vector<std::string>& columns, const std::vector<Part>& parts) {
  std::vector<double> heights(columns.size(), 0);
  for (const Part& part : parts)
    for (size_t i = 0; i < columns.size(); ++i) heights[i] += part.values[i];
  const double highest = columns.empty() ? 0 : *std::ranges::max_element(heights);
  const Range y{0, highest > 0 ? 1.05 * highest : 1};
  std::string out = figure_start(text) + plot_start(text);
  for (double tick : linear_ticks(y, 4)) out += y_tick(1 - tick / y.high, short_number(tick));
  const double width = 1.0 / static_cast<double>(std::max<size_t>(1, columns.size()));
  const size_t every = (columns.size() + 7) / 8;  // labels that fit
  for (size_t i = 0; i < columns.size(); ++i) {
    const double left = static_cast<double>(i) * width;
    if (i % every == 0) out += x_tick(left + width / 2, columns[i]);
    double bottom = 0;
    for (const Part& part : parts) {
      const double value = part.values[i];
      out += fmt::format(
          "<rect x=\"{:.2f}%\" y=\"{:.2f}%\" width=\"{:.2f}%\" height=\"{:.2f}%\" fill=\"{}\">"
          "<title>{}</title></rect>\n",
          100 * (left + 0.1 * width), 100 * (1 - (bottom + value) / y.high), 80 * width,
          100 * value / y.high, part.color,
          html_escape(fmt::format("{} {}, {}: {} {}", text.x, columns[i], part.name,
                                  short_number(value), unit)));
      bottom += value;
    }
  }
  out += x_title(text.x) + "</svg>\n<div class=\"legend\">";
  for (const Part& part : parts) out += legend_entry(box_of(part.color), part.name);
  return out + "</div>\n</figure>\n";
}

std::string share_bar(const std::string& unit, const std::vector<Part>& parts) {
  double sum = 0;
  for (const Part& part : parts) sum += part.values.at(0);
  std::string out = "<figure>\n<svg class=\"bar\" role=\"img\" aria-label=\"shares\">\n";
  std::string legend;
  double left = 0;
  for (const Part& part : parts) {
    const double value = part.values[0], share = sum > 0 ? value / sum : 0;
    const std::string words =
        fmt::format("{}: {} {}, {:.0f} %", part.name, short_number(value), unit, 100 * share);
    out += fmt::format(
        "<rect x=\"{:.2f}%\" width=\"{:.2f}%\" height=\"100%\" fill=\"{}\"><title>{}</title>"
        "</rect>\n",
        100 * left, 100 * share, part.color, html_escape(words));
    legend += legend_entry(box_of(part.color), words);
    left += share;
  }
  return out + "</svg>\n<div class=\"legend\">" + legend + "</div>\n</figure>\n";
}

std::string ordered_color(size_t i, size_t n) {
  constexpr std::array<std::array<double, 3>, 3> kAnchors{
      {{42, 120, 214}, {160, 79, 192}, {232, 100, 44}}};
  const double at = n > 1 ? 2.0 * static_cast<double>(i) / static_cast<double>(n - 1) : 0;
  const size_t from = at < 1 ? 0 : 1;
  const double part = at - static_cast<double>(from);
  const auto channel = [&](size_t c) {
    return static_cast<int>((1 - part) * kAnchors[from][c] + part * kAnchors[from + 1][c]);
  };
  return fmt::format("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2));
}

std::string ordered_legend(const std::string& first, const std::string& last) {
  constexpr size_t kSteps = 12;
  std::string out = fmt::format("<div class=\"legend\"><span>{}", html_escape(first));
  out += "<svg class=\"ramp\" aria-hidden=\"true\">";
  for (size_t i = 0; i < kSteps; ++i)
    out += fmt::format("<rect x=\"{0:.2f}%\" width=\"{1:.2f}%\" height=\"100%\" fill=\"{2}\"/>",
                       100.0 * static_cast<double>(i) / kSteps, 100.0 / kSteps + 0.3,
                       ordered_color(i, kSteps));
  return out + fmt::format("</svg>{}</span></div>\n", html_escape(last));
}

}  // namespace bbb::tools
