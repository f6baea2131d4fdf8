// The multiple-choice tasks of `bbb eval`: reads their files into the prompts of EleutherAI's
// lm-evaluation-harness (zero-shot), and turns log-likelihoods into accuracies as it does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/likelihood.h"

namespace bbb::tools {

struct Choice {
  std::string context;
  std::string continuation;  // starts with the space between context and choice
};

struct TaskItem {
  std::vector<Choice> choices;
  int64_t gold = 0;  // index of the right choice
};

enum class Accuracy { Plain, Normalized };  // acc, acc_norm

struct EvalTask {
  std::string name;
  Accuracy reported;               // what the average over tasks takes
  std::vector<std::string> files;  // names, the first that a directory has is read
};

// piqa, arc_easy, arc_challenge, hellaswag, winogrande.
const std::vector<EvalTask>& eval_tasks();
// The task's file in the directory, or "" if there is none.
std::string find_task_file(const EvalTask& task, const std::string& directory);
// All items. A malformed line throws Error that names file and line. The forms of each task's file
// are listed in eval_tasks.cpp.
std::vector<TaskItem> read_task(const EvalTask& task, const std::string& path);

// For each choice: tokenizes context + continuation as one text; the continuation is what follows
// as many tokens as the context alone has. Spaces at the end of the context count as continuation.
// BOS comes first if the tokenizer adds it. Keeps the last most_tokens tokens, and scores at most
// all but the first of them. Throws if nothing is left to score.
std::vector<models::ScoredTokens> encode_item(const data::Tokenizer& tokenizer,
                                              const TaskItem& item, int64_t most_tokens);

// acc: share of the items whose right choice has the highest log-likelihood, the first of equals.
// acc_norm: log-likelihood per character of the choice, without the space before it. A standard
// error is the sample standard deviation / sqrt(n); 0 for one item.
struct TaskResult {
  int64_t items = 0;
  double acc = 0, acc_stderr = 0;
  double acc_norm = 0, acc_norm_stderr = 0;

  double reported(Accuracy accuracy) const { return accuracy == Accuracy::Plain ? acc : acc_norm; }
};
// log_likelihoods: of all choices of all items, in order.
TaskResult score_task(const std::vector<TaskItem>& items,
                      const std::vector<double>& log_likelihoods);

}  // namespace bbb::tools
