#include "tools/report_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "data/files.h"
#include "tools/chart.h"
#include "train/config_table.h"

namespace bbb::tools {

using train::LoggedBlockStage;
using train::LoggedSteps;

namespace {

constexpr const char* kColors[] = {"var(--c0)", "var(--c1)", "var(--c2)",
                                   "var(--c3)", "var(--c4)", "var(--c5)"};

// Light, dark and printed; the values of --c0.. differ so that both backgrounds contrast.
constexpr const char* kStyle = R"(
:root { color-scheme: light dark; --page: #f5f4f0; --card: #ffffff; --text: #1c1c1a; --muted: #5d5c57;
  --rule: #dedcd5; --c0: #2a78d6; --c1: #d9591f; --c2: #178f68; --c3: #b97f00; --c4: #6a56c9;
  --c5: #c74f82; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #151514; --card: #1f1f1d; --text: #eceae4; --muted: #aaa8a0; --rule: #3a3936;
    --c0: #5598e7; --c1: #ef8a5a; --c2: #35b88b; --c3: #d9a520; --c4: #9a8aec; --c5: #e583ab; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 20px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0; max-width: 80ch; color: var(--muted); overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 14px 16px; margin: 14px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin-top: 12px; }
.tiles div { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 8px 12px; }
.tiles b { display: block; font-size: 17px; }
.tiles span { color: var(--muted); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 8px 24px; }
figure { margin: 10px 0 0; min-width: 0; break-inside: avoid; }
figcaption { margin-bottom: 8px; }
figcaption span { color: var(--muted); font-size: 13px; }
svg { overflow: visible; }
.plot { display: block; width: calc(100% - 66px); height: 220px; margin: 0 10px 44px 56px; }
.plot text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.plot .x { text-anchor: middle; }
.plot .y { text-anchor: end; }
.frame { fill: none; stroke: var(--rule); }
.grid { stroke: var(--rule); }
.line, .pale { fill: none; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.pale { stroke-width: 1; opacity: 0.5; }
.ring { fill: var(--card); stroke-width: 1.5; }
.bar { display: block; width: 100%; height: 26px; margin-bottom: 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 18px; height: 12px; flex: none; }
.ramp { width: 120px; height: 10px; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.v { overflow-wrap: anywhere; min-width: 12ch; }
td.h { color: var(--muted); }
tr { break-inside: avoid; }
@media (max-width: 560px) { body { padding: 10px; } td.h { display: none; } }
@media print {
  :root { --page: #ffffff; }
  body { padding: 0; font-size: 11pt; max-width: none; }
  section { border: none; padding: 0; }
  h2, p { break-after: avoid; }
  .plot { height: 180px; }
  .charts { grid-template-columns: 1fr 1fr; }
}
)";

// "0.85 s", "42 s", "12 min 3 s", "3 h 5 min".
std::string duration(double seconds) {
  if (seconds < 60) return short_number(seconds) + " s";
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  return whole < 3600 ? fmt::format("{} min {} s", whole / 60, whole % 60)
                      : fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

std::string tile(const std::string& value, const std::string& what) {
  return fmt::format("<div><b>{}</b><span>{}</span></div>\n", html_escape(value),
                     html_escape(what));
}

std::string paragraph(const std::string& text) {
  return fmt::format("<p>{}</p>\n", html_escape(text));
}

std::string section(const std::string& title, const std::string& content) {
  return fmt::format("<section>\n<h2>{}</h2>\n{}</section>\n", html_escape(title), content);
}

// At most `most` points: each is the mean of as many steps in a row. Step 1 is the first.
std::vector<Point> curve_of(const LoggedSteps& steps, size_t most) {
  const size_t n = steps.loss.size(), each = std::max<size_t>(1, (n + most - 1) / most);
  std::vector<Point> points;
  for (size_t begin = 0; begin < n; begin += each) {
    const size_t end = std::min(n, begin + each);
    points.push_back({0.5 * static_cast<double>(begin + 1 + end), steps.mean_loss(begin, end)});
  }
  return points;
}

// The mean of the steps around each point, a tenth of the stage wide.
std::vector<Point> smoothed(const LoggedSteps& steps, std::vector<Point> points) {
  const double half = static_cast<double>(steps.loss.size()) / 20;
  for (Point& p : points) {
    const double begin = std::max(0.0, std::floor(p.x - 1 - half));
    p.y = steps.mean_loss(static_cast<size_t>(begin), static_cast<size_t>(p.x + half));
  }
  return points;
}

// The stages of the blocks: for each stage its entries, in the order of the blocks.
using ByStage = std::vector<std::vector<const LoggedBlockStage*>>;

ByStage by_stage(const train::RunLog& log) {
  ByStage stages;
  size_t t = 0;
  for (size_t i = 0; i < log.blocks.size(); ++i) {
    t = i > 0 && log.blocks[i].block == log.blocks[i - 1].block ? t + 1 : 0;
    if (t == stages.size()) stages.emplace_back();
    stages[t].push_back(&log.blocks[i]);
  }
  return stages;
}

std::string stage_title(const ByStage& stages, size_t t) {
  const std::string& name = stages[t].front()->stage;
  return stages.size() == 1 ? name : fmt::format("Stage {}: {}", t + 1, name);
}

// The mean of the last epoch's steps.
double reconstruction(const LoggedBlockStage& stage, const train::TrainConfig& config) {
  const size_t n = stage.loss.size();
  const auto epoch = static_cast<size_t>(config.samples / config.batch);
  return stage.mean_loss(n > epoch ? n - epoch : 0, n);
}

std::string block_losses(const ByStage& stages, int64_t layers) {
  constexpr size_t kPointsOfAll = 3000;  // of a chart, which keeps the page small
  std::vector<std::vector<Series>> charts;
  std::vector<Series> all;
  for (const auto& entries : stages) {
    const size_t most = std::clamp<size_t>(kPointsOfAll / entries.size(), 20, 200);
    charts.emplace_back();
    for (const LoggedBlockStage* entry : entries)
      charts.back().push_back(
          {fmt::format("block {}, {}", entry->block, entry->stage),
           ordered_color(static_cast<size_t>(entry->block), static_cast<size_t>(layers)),
           Mark::Line, curve_of(*entry, most)});
    all.insert(all.end(), charts.back().begin(), charts.back().end());
  }
  const Range y = log_range(all);
  std::string out = paragraph(
      "A curve for each block: the mean squared error between its output and its target, step by "
      "step. Long stages are drawn as means of neighbouring steps.");
  out +=
      ordered_legend("block 0", fmt::format("block {}", layers - 1)) + "<div class=\"charts\">\n";
  for (size_t t = 0; t < stages.size(); ++t)
    out += line_chart({stage_title(stages, t), "mean squared error, log scale", "step"}, y,
                      charts[t], Legend::None);
  return section("Loss of the blocks", out + "</div>\n");
}

std::string error_table(const ByStage& stages, const train::TrainConfig& config) {
  std::string head = "<tr><th rowspan=\"2\" class=\"n\">block</th>", names;
  for (size_t t = 0; t < stages.size(); ++t) {
    head += fmt::format("<th colspan=\"3\">{}</th>", html_escape(stage_title(stages, t)));
    names += "<th class=\"n\">before</th><th class=\"n\">after</th><th class=\"n\">steps</th>";
  }
  std::string rows;
  for (size_t i = 0; i < stages[0].size(); ++i) {
    rows += fmt::format("<tr><td class=\"n\">{}</td>", stages[0][i]->block);
    for (const auto& entries : stages) {
      const bool there = i < entries.size();
      for (double error : {there ? entries[i]->start() : NAN, there ? entries[i]->result() : NAN,
                           there ? reconstruction(*entries[i], config) : NAN})
        rows += fmt::format("<td class=\"n\">{}</td>", short_number(error));
    }
    rows += "</tr>\n";
  }
  return fmt::format("<div class=\"scroll\"><table>\n{}</tr>\n<tr>{}</tr>\n{}</table></div>\n",
                     head, names, rows);
}

std::string block_errors(const ByStage& stages, const train::TrainConfig& config) {
  std::vector<std::vector<Series>> charts;
  std::vector<Series> all;
  for (const auto& entries : stages) {
    Series before{"validation before training", kColors[1], Mark::Rings, {}};
    Series after{"validation of the result", kColors[0], Mark::Dots, {}};
    Series steps{"reconstruction, last epoch's steps", kColors[2], Mark::Line, {}};
    for (const LoggedBlockStage* entry : entries) {
      const double x = static_cast<double>(entry->block);
      before.points.push_back({x, entry->start()});
      after.points.push_back({x, entry->result()});
      steps.points.push_back({x, reconstruction(*entry, config)});
    }
    charts.push_back({before, after, steps});
    all.insert(all.end(), charts.back().begin(), charts.back().end());
  }
  const Range y = log_range(all);
  std::string out = paragraph(
      "The result of a stage is the state with the lowest validation error, the start among them. "
      "Errors add up from block to block, and the outputs of later blocks are larger.");
  out += "<div class=\"charts\">\n";
  for (size_t t = 0; t < stages.size(); ++t)
    out += line_chart({stage_title(stages, t), "mean squared error, log scale", "block"}, y,
                      charts[t], Legend::Series);
  return section("Error of every block", out + "</div>\n" + error_table(stages, config));
}

const char* loss_name(train::EndToEndLoss loss) {
  switch (loss) {
    case train::EndToEndLoss::Kl:
      return "KL divergence from the full-precision model, nats a token, log scale";
    case train::EndToEndLoss::JensenShannon:
      return "Jensen-Shannon divergence from the full-precision model, nats a token, log scale";
    default:
      return "cross-entropy of the text, nats a token, log scale";
  }
}

std::string end_to_end(const train::RunLog& log, const train::TrainConfig& config) {
  constexpr size_t kPoints = 400;
  std::vector<std::vector<Series>> charts;
  std::vector<Series> all;
  for (const LoggedSteps& stage : log.whole) {
    const std::vector<Point> points = curve_of(stage, kPoints);
    charts.push_back(
        {{"steps", kColors[0], Mark::PaleLine, points},
         {"mean over a tenth of the stage", kColors[0], Mark::Line, smoothed(stage, points)}});
    all.insert(all.end(), charts.back().begin(), charts.back().end());
  }
  const Range y = log_range(all);
  std::string out;
  if (!config.any_precision.empty()) out += paragraph("The loss is the sum over the precisions.");
  out += "<div class=\"charts\">\n";
  for (size_t i = 0; i < charts.size(); ++i)
    out +=
        line_chart({log.whole.size() == 1 ? log.whole[i].stage
                                          : fmt::format("Stage {}: {}", i + 1, log.whole[i].stage),
                    loss_name(config.e2e_loss), "step"},
                   y, charts[i], Legend::Series);
  return section("Loss end to end", out + "</div>\n");
}

std::string perplexity(const Report& r) {
  std::string rows;
  const auto row = [&](const std::string& what, const std::string& before, const std::string& after,
                       const std::string& from) {
    rows += fmt::format(
        "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td "
        "class=\"v\">{}</td></tr>\n",
        html_escape(what), html_escape(before), html_escape(after), html_escape(from));
  };
  const auto value = [](const std::optional<MeasuredPerplexity>& p) {
    return p ? fmt::format("{:.2f} \u00b1 {:.2f}", p->perplexity, p->perplexity * p->nll_stderr)
             : std::string("not measured");
  };
  if (r.before || r.after) {
    const MeasuredPerplexity& one = r.before ? *r.before : *r.after;
    std::string files = r.before ? r.before->file : "";
    if (r.after) files += (files.empty() ? "" : ", ") + r.after->file;
    row(fmt::format("{} windows, {} tokens", one.windows, one.tokens), value(r.before),
        value(r.after), files);
  }
  std::string out;
  const bool of_text = r.identity.config.e2e_loss == train::EndToEndLoss::CrossEntropy;
  if (of_text && !r.log.whole.empty()) {
    const LoggedSteps &first = r.log.whole.front(), &last = r.log.whole.back();
    const auto share = [](const LoggedSteps& s) { return std::max<size_t>(1, s.loss.size() / 20); };
    const size_t n = last.loss.size();
    row("training text, quantized model", short_number(std::exp(first.mean_loss(0, share(first)))),
        short_number(std::exp(last.mean_loss(n - share(last), n))),
        "exp of the loss of the first and the last twentieth of the steps");
    out += paragraph("On the text that is trained on, a perplexity is lower than on other text.");
  }
  if (!r.before || !r.after)
    out += paragraph(
        "The run itself does not know the perplexity of the full-precision model or of the export: "
        "it logs block errors and the loss it trains on. Measure each with bbb ppl --json FILE, "
        "and "
        "give the files to bbb report as --before and --after.");
  if (!rows.empty())
    out +=
        "<div class=\"scroll\"><table>\n<tr><th>on</th><th class=\"n\">before</th>"
        "<th class=\"n\">after</th><th>from</th></tr>\n" +
        rows + "</table></div>\n";
  return section("Perplexity", out);
}

bool timed_whole(const train::RunLog& log, int64_t block) {
  return std::ranges::any_of(log.times,
                             [&](const train::LoggedTime& t) { return t.block == block; });
}

std::vector<Part> time_parts(const train::RunLog& log) {
  double steps = 0, validation = 0, streams = 0, weights = 0;
  for (const train::LoggedTime& t : log.times) {
    steps += t.time.train_s();
    validation += t.time.validation_s();
    streams += t.time.streams_s;
    weights += t.time.weights_s;
  }
  for (const LoggedBlockStage& stage : log.blocks)
    if (!timed_whole(log, stage.block)) steps += stage.seconds;
  std::vector<Part> parts;
  if (!log.blocks.empty())
    parts = {{"steps of blocks", kColors[0], {steps}},
             {"validation", kColors[1], {validation}},
             {"streams", kColors[2], {streams}},
             {"weights", kColors[3], {weights}}};
  for (size_t i = 0; i < log.whole.size(); ++i)
    parts.push_back({fmt::format("end to end {}", log.whole[i].stage),
                     kColors[4 + i % 2],
                     {log.whole[i].seconds}});
  return parts;
}

double sum_of(const std::vector<Part>& parts) {
  double sum = 0;
  for (const Part& part : parts) sum += part.values[0];
  return sum;
}

std::string times(const Report& r) {
  std::string out = share_bar("s", time_parts(r.log));
  if (!r.log.times.empty()) {
    std::vector<std::string> blocks;
    std::vector<Part> parts{{"steps", kColors[0], {}},
                            {"validation", kColors[1], {}},
                            {"streams", kColors[2], {}},
                            {"weights", kColors[3], {}}};
    for (const train::LoggedTime& t : r.log.times) {
      blocks.push_back(fmt::format("{}", t.block));
      const double values[] = {t.time.train_s(), t.time.validation_s(), t.time.streams_s,
                               t.time.weights_s};
      for (size_t i = 0; i < parts.size(); ++i) parts[i].values.push_back(values[i]);
    }
    out += column_chart({"Blocks", "seconds", "block"}, "s", blocks, parts);
  }
  if (!r.log.blocks.empty())
    out += paragraph(
        "Streams: passes of the hidden states through a block. Weights: reading them, moving them, "
        "waiting for files. Of the last block, and of blocks that a resumed run began in their "
        "middle, the log has only the steps.");
  out += paragraph(
      "Not in the log: loading the model, statistics of the input sites, choosing algorithms of "
      "matrix products, and saving states.");
  return section("Where the time went", out);
}

std::string options(const train::TrainConfig& config) {
  const bool blocks = !config.stages.empty();
  std::vector<std::pair<std::string, std::string>> tables;  // heading, rows
  train::visit_stored(config, [&](const auto& value, const train::Field& f) {
    std::string heading = f.group != nullptr ? f.group : "Result and machine";
    if (heading.empty()) heading = "Run";
    if ((heading == train::kBlocks && !blocks) ||
        (heading == train::kEndToEnd && !train::trains_whole(config)))
      return;
    auto table = std::ranges::find_if(tables, [&](const auto& t) { return t.first == heading; });
    if (table == tables.end()) table = tables.insert(table, {heading, ""});
    const std::string text = train::option_text(value, f);
    table->second += fmt::format(
        "<tr><td>{}</td><td class=\"v\">{}</td><td class=\"h\">{}</td></tr>\n", html_escape(f.name),
        html_escape(text.empty() ? "-" : text), html_escape(f.help));
  });
  std::string out = paragraph("As the run resolved them: defaults are filled in.");
  for (const auto& [heading, rows] : tables)
    out += fmt::format(
        "<div class=\"scroll\"><table>\n<tr><th colspan=\"3\">{}</th></tr>\n{}</table></div>\n",
        html_escape(heading), rows);
  return section("Options", out);
}

std::string tiles(const Report& r) {
  const train::TrainConfig& c = r.identity.config;
  size_t steps = 0;
  int64_t skipped = 0, tokens = 0;
  for (const LoggedBlockStage& s : r.log.blocks) {
    steps += s.loss.size();
    skipped += s.skipped;
    tokens += static_cast<int64_t>(s.loss.size()) * c.batch * c.seq_len;
  }
  for (const LoggedSteps& s : r.log.whole) {
    steps += s.loss.size();
    skipped += s.skipped;
    tokens += static_cast<int64_t>(s.loss.size()) * c.e2e_batch * c.seq_len;
  }
  std::string out = "<div class=\"tiles\">\n";
  out += tile(r.state, "state");
  const std::string widths = train::allocates(c) ? fmt::format("w2-4a{}", c.act_bits)
                                                 : fmt::format("w{}a{}", c.bits, c.act_bits);
  out += tile(widths, "bits of weights and activations");
  if (r.before && r.after)
    out += tile(fmt::format("{:.2f} \u2192 {:.2f}", r.before->perplexity, r.after->perplexity),
                "perplexity, before and after");
  if (r.after)
    out += tile(fmt::format("{:.3f}", r.after->bits_per_weight), "bits per weight, exported");
  out += tile(duration(sum_of(time_parts(r.log))), "of training, as logged");
  out += tile(short_number(static_cast<double>(tokens)), "tokens through steps");
  out += tile(fmt::format("{:.2f} GB", static_cast<double>(r.log.peak_bytes) / 1e9),
              "most device memory, recompute " + r.log.recompute);
  out += tile(fmt::format("{} of {}", skipped, steps), "steps skipped: not finite");
  return out + "</div>\n";
}

// The number after `prefix` in a tensor's name, plus 1; 0 if it has another form.
int64_t layer_after(const std::string& name, const std::string& prefix) {
  int64_t layer = 0;
  if (!name.starts_with(prefix)) return 0;
  const char* begin = name.data() + prefix.size();
  const auto [end, error] = std::from_chars(begin, name.data() + name.size(), layer);
  return error == std::errc() && *end == '.' ? layer + 1 : 0;
}

std::string state_of(const train::RunDirectory& run, const train::TrainConfig& config,
                     const train::RunLog& log, int64_t layers) {
  if (run.finished(config, layers)) return "finished";
  if (!log.whole.empty())
    return fmt::format("unfinished: {}, step {}", log.whole.back().stage,
                       log.whole.back().loss.size());
  return fmt::format(
      "unfinished: {} of {} blocks",
      run.finished_stages(config, layers) / std::max<int64_t>(1, block_stages(config)), layers);
}

}  // namespace

MeasuredPerplexity read_perplexity(const std::string& file) {
  try {
    const train::Json json = train::Json::parse(data::read_file(file));
    return {file,
            json.at("perplexity"),
            json.at("nll_stderr"),
            json.at("bits_per_weight"),
            json.at("windows"),
            json.at("tokens")};
  } catch (const nlohmann::json::exception& error) {
    throw Error(cat(file, ": not written by bbb ppl --json: ", error.what()));
  }
}

Report read_report(const std::string& path) {
  const train::RunDirectory run(path);
  Report report;
  report.run = path;
  report.identity = run.identity();
  report.log = train::read_log(run, report.identity.config);
  BBB_CHECK(!report.log.blocks.empty() || !report.log.whole.empty(), run.log_file(),
            ": holds no step: ",
            report.identity.config.method == train::Method::Gptq
                ? "--method gptq rounds, and nothing is trained behind it yet"
                : "nothing is trained yet");
  for (const auto& [name, checksum] : report.identity.model)
    report.layers =
        std::max({report.layers, layer_after(name, "model.layers."), layer_after(name, "blk.")});
  report.state = state_of(run, report.identity.config, report.log, report.layers);
  return report;
}

std::string report_page(const Report& r) {
  const train::TrainConfig& config = r.identity.config;
  const std::string title = html_escape("bbb run " + r.run);
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<meta "
      "name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{0}</title>\n"
      "<style>{1}</style>\n</head>\n<body>\n<h1>{0}</h1>\n",
      title, kStyle);
  out += paragraph(fmt::format("{} on {}; {} blocks; bbb {}", config.model, r.identity.device_name,
                               r.layers, BBB_VERSION));
  out += tiles(r) + perplexity(r);
  if (!r.log.blocks.empty()) {
    const ByStage stages = by_stage(r.log);
    out += block_losses(stages, r.layers) + block_errors(stages, config);
  }
  if (!r.log.whole.empty()) out += end_to_end(r.log, config);
  out += times(r) + options(config);
  return out + "</body>\n</html>\n";
}

}  // namespace bbb::tools
