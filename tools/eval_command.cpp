// bbb eval: zero-shot accuracy of any checkpoint on multiple-choice tasks, asked and scored as
// EleutherAI's lm-evaluation-harness does.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "data/files.h"
#include "engine/progress.h"
#include "models/likelihood.h"
#include "models/llama.h"
#include "tools/cli.h"
#include "tools/eval_tasks.h"
#include "tools/load_model.h"
#include "tools/ranks.h"

namespace bbb::tools {

namespace {

constexpr int64_t kDefaultContext_tokens = 2048;  // for a model that does not name its maximum

struct LoadedTask {
  EvalTask task;
  std::vector<TaskItem> items;
};

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

// Of a list such as "piqa,arc_easy"; an empty list means all.
std::vector<EvalTask> chosen_tasks(const std::string& list) {
  if (list.empty()) return eval_tasks();
  std::vector<EvalTask> chosen;
  std::istringstream stream(list);
  for (std::string name; std::getline(stream, name, ',');) {
    const auto is_named = [&](const EvalTask& task) { return task.name == name; };
    const auto known = std::find_if(eval_tasks().begin(), eval_tasks().end(), is_named);
    if (known == eval_tasks().end()) {
      std::vector<std::string> names;
      for (const EvalTask& task : eval_tasks()) names.push_back(task.name);
      throw UsageError(cat("--tasks takes ", joined(names), ", not '", name, "'"));
    }
    if (std::none_of(chosen.begin(), chosen.end(), is_named)) chosen.push_back(*known);
  }
  return chosen;
}

// The first `limit` items of each task, 0: all. A task without a file is left out unless the user
// named it.
std::vector<LoadedTask> load_tasks(const std::vector<EvalTask>& tasks, bool named,
                                   const std::string& directory, int64_t limit) {
  BBB_CHECK(std::filesystem::is_directory(directory), directory, " is no directory");
  std::vector<LoadedTask> loaded;
  std::vector<std::string> missing;
  for (const EvalTask& task : tasks) {
    const std::string path = find_task_file(task, directory);
    if (path.empty()) {
      BBB_CHECK(!named, directory, ": no file for ", task.name, "; looked for ",
                joined(task.files));
      missing.insert(missing.end(), task.files.begin(), task.files.end());
      continue;
    }
    loaded.push_back({task, read_task(task, path)});
    std::vector<TaskItem>& items = loaded.back().items;
    if (limit > 0 && static_cast<int64_t>(items.size()) > limit)
      items.resize(static_cast<size_t>(limit));
  }
  BBB_CHECK(!loaded.empty(), directory, ": no task's file; looked for ", joined(missing));
  return loaded;
}

// Ranks share the choices of all items.
TaskResult evaluate(models::Llama& model, const data::Tokenizer& tokenizer,
                    const LoadedTask& loaded, quant::KvFormat kv, engine::Comm& comm) {
  const double never_s = std::numeric_limits<double>::infinity();
  const int64_t max_position = model.config().max_position;
  const int64_t most_tokens = (max_position > 0 ? max_position : kDefaultContext_tokens) + 1;
  std::vector<models::ScoredTokens> sequences;
  {
    engine::Progress progress(loaded.task.name + " tokens",
                              static_cast<int64_t>(loaded.items.size()),
                              comm.first() ? engine::Progress::kPatience_s : never_s);
    for (size_t i = 0; i < loaded.items.size(); ++i) {
      for (models::ScoredTokens& choice : encode_item(tokenizer, loaded.items[i], most_tokens))
        sequences.push_back(std::move(choice));
      progress.set(static_cast<int64_t>(i + 1));
    }
  }
  const auto count = static_cast<int64_t>(sequences.size());
  std::vector<models::ScoredTokens> own;
  for (size_t i = static_cast<size_t>(comm.rank()); i < sequences.size();
       i += static_cast<size_t>(comm.size()))
    own.push_back(std::move(sequences[i]));
  engine::Progress progress(loaded.task.name, comm.share(count), comm.first() ? 0 : never_s);
  const std::vector<double> scores = log_likelihoods(
      model, own, [&](int64_t done) { progress.set(done); }, kv);
  return score_task(loaded.items, from_all_ranks(comm, scores, count));
}

void measure_tasks(const CommandLine& line, engine::Comm& comm, int local_rank);

}  // namespace

int eval_command(const Arguments& arguments) {
  std::string summary = "Zero-shot accuracy of a checkpoint on multiple-choice tasks\n\nFiles:\n";
  for (const EvalTask& task : eval_tasks())
    summary += fmt::format("  {:<14} {}\n", task.name, joined(task.files));
  CommandLine line("eval", summary);
  line.options()                                                             //
      ("model", "directory or GGUF file", cxxopts::value<std::string>())     //
      ("bits", CommandLine::kNestedBitsHelp, cxxopts::value<std::string>())  //
      ("kv-bits", CommandLine::kKvBitsHelp,
       cxxopts::value<std::string>()->default_value("16"))                         //
      ("data", "directory of the tasks' files", cxxopts::value<std::string>())     //
      ("tasks", "separated by commas; default: all with a file in the directory",  //
       cxxopts::value<std::string>())                                              //
      ("limit", "first items of each task; 0: all",                                //
       cxxopts::value<std::string>()->default_value("0"))                          //
      ("json", "write the result to this file too", cxxopts::value<std::string>());
  add_rank_options(line);
  if (!line.parse(arguments)) return 0;
  return run_as_rank(ranks_asked(line), "eval", arguments, [&](const auto& comm, int local_rank) {
    measure_tasks(line, *comm, local_rank);
  });
}

namespace {

void measure_tasks(const CommandLine& line, engine::Comm& comm, int local_rank) {
  const std::string model_path = line.required("model"), directory = line.required("data");
  const int64_t limit = line.integer("limit", 0);
  const quant::KvFormat kv = line.kv_format();
  const std::vector<EvalTask> chosen =
      chosen_tasks(line.has("tasks") ? line.required("tasks") : "");
  if (comm.first()) check_writable(line, "json");

  // First: a missing GPU should not cost a long read.
  const auto backend = make_rank_backend(rank_device(line), line.threads(), comm, local_rank);
  const std::vector<LoadedTask> tasks = load_tasks(chosen, line.has("tasks"), directory, limit);
  const auto source = models::open_checkpoint(model_path, line.nested_bits());
  backend->check_head_size(source->config().head_dim);
  models::KvCache::check(source->config(), kv);
  const auto tokenizer = data::load_tokenizer(model_path);
  const auto model = load_model(*backend, *source);  // last: it reads every weight

  nlohmann::ordered_json json_tasks = nlohmann::ordered_json::object();
  double average = 0;
  fmt::print("{:<14}{:>7}{:>9}{:>9}{:>10}{:>9}\n", "task", "items", "acc", "+-", "acc_norm", "+-");
  for (const LoadedTask& loaded : tasks) {
    const TaskResult result = evaluate(*model, *tokenizer, loaded, kv, comm);
    fmt::print("{:<14}{:>7}{:>9.4f}{:>9.4f}{:>10.4f}{:>9.4f}\n", loaded.task.name, result.items,
               result.acc, result.acc_stderr, result.acc_norm, result.acc_norm_stderr);
    std::fflush(stdout);  // a task may take minutes
    average += result.reported(loaded.task.reported) / static_cast<double>(tasks.size());
    json_tasks[loaded.task.name] = {{"n", result.items},
                                    {"acc", result.acc},
                                    {"acc_stderr", result.acc_stderr},
                                    {"acc_norm", result.acc_norm},
                                    {"acc_norm_stderr", result.acc_norm_stderr}};
  }
  fmt::print(
      "average {:.4f} (acc_norm of arc and hellaswag, acc of the others)  "
      "{:.4f} bits per weight on {}\n",
      average, source->bits_per_weight(), backend->device_name());
  if (line.has("json") && comm.first()) {
    const nlohmann::ordered_json json = {{"tasks", json_tasks},
                                         {"average", average},
                                         {"model", model_path},
                                         {"device", backend->device_name()},
                                         {"bits_per_weight", source->bits_per_weight()},
                                         {"kv_bits", kv.bits}};
    data::write_file_atomic(line.text("json"), json.dump(2) + "\n");
  }
}

}  // namespace

}  // namespace bbb::tools
