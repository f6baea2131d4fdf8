// Forms of the task files; a .jsonl holds one item a line, blank lines do not count.
//
//   piqa        {"goal", "sol1", "sol2"} and {"label"}, or labels in NAME-labels.lst, one a line
//   arc_*       {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}
//               {"question": "..", "choices": {"text": [..], "label": [..]}, "answerKey"}
//               {"query": "Question: ..\nAnswer:", "choices": [..], "gold"}
//   hellaswag   {"activity_label", "ctx_a", "ctx_b" or "ctx", "endings", "label"}
//               .txt: six lines an item: "activity: context", label, four endings
//   winogrande  {"sentence" with "_", "option1", "option2", "answer": "1" or "2"}
//               {"context_options": [2], "continuation", "gold"}
#include "tools/eval_tasks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <string_view>
#include <utility>

#include "data/files.h"
#include "data/json.h"
#include "data/text.h"
#include "quant/check.h"

namespace bbb::tools {

namespace {

using nlohmann::json;
using Texts = std::vector<std::string>;

constexpr std::string_view kSpaces = " \t\n\v\f\r";

std::string strip(const std::string& text) {
  const size_t begin = text.find_first_not_of(kSpaces);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(kSpaces) + 1 - begin);
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
}

Texts lines_of(const std::string& path) {
  const std::string content = data::read_text(path);
  Texts lines;
  for (size_t begin = 0; begin < content.size();) {
    const size_t end = std::min(content.find('\n', begin), content.size());
    lines.push_back(content.substr(begin, end - begin));
    if (lines.back().ends_with('\r')) lines.back().pop_back();
    begin = end + 1;
  }
  return lines;
}

bool is_blank(const std::string& line) { return line.find_first_not_of(kSpaces) == line.npos; }

int64_t index_of_text(const std::string& text, int64_t count, const std::string& where) {
  int64_t index = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), index);
  BBB_CHECK(error == std::errc() && end == text.data() + text.size() && index >= 0 && index < count,
            where, ": '", data::printable(text), "' is not the index of one of ", count,
            " choices");
  return index;
}

// A JSON object and where it is in a file, for errors.
struct Row {
  const json& object;
  const std::string& where;

  bool has(const char* key) const { return object.contains(key); }
  const json& at(const char* key) const {
    BBB_CHECK(object.is_object() && object.contains(key), where, ": no \"", key, "\"");
    return object.at(key);
  }
  std::string text(const char* key) const {
    BBB_CHECK(at(key).is_string(), where, ": \"", key, "\" is not a string");
    return at(key).get<std::string>();
  }
  Texts texts(const char* key) const {
    const json& list = at(key);
    const auto is_string = [](const json& value) { return value.is_string(); };
    BBB_CHECK(list.is_array() && std::all_of(list.begin(), list.end(), is_string), where, ": \"",
              key, "\" is not a list of strings");
    return list.get<Texts>();
  }
  // The index of a choice, as a number or its text.
  int64_t index(const char* key, size_t count) const {
    const json& value = at(key);
    return index_of_text(value.is_string() ? value.get<std::string>() : value.dump(),
                         static_cast<int64_t>(count), where);
  }
};

TaskItem make_item(const std::string& context, const Texts& texts, int64_t gold) {
  TaskItem item;
  item.gold = gold;
  for (const std::string& text : texts) item.choices.push_back({context, " " + text});
  return item;
}

std::string question(const std::string& text) { return "Question: " + text + "\nAnswer:"; }

TaskItem piqa_item(const Row& row) {
  return make_item(question(row.text("goal")), {row.text("sol1"), row.text("sol2")},
                   row.index("label", 2));
}

TaskItem arc_item(const Row& row) {
  if (row.has("query")) {
    const Texts texts = row.texts("choices");
    return make_item(row.text("query"), texts, row.index("gold", texts.size()));
  }
  std::string stem;
  Texts texts, labels;
  if (row.at("question").is_object()) {
    const Row inner{row.at("question"), row.where};
    stem = inner.text("stem");
    BBB_CHECK(inner.at("choices").is_array(), row.where, ": \"choices\" is not a list");
    for (const json& choice : inner.at("choices")) {
      texts.push_back(Row{choice, row.where}.text("text"));
      labels.push_back(Row{choice, row.where}.text("label"));
    }
  } else {
    const Row choices{row.at("choices"), row.where};
    stem = row.text("question");
    texts = choices.texts("text");
    labels = choices.texts("label");
    BBB_CHECK(texts.size() == labels.size(), row.where, ": ", texts.size(), " choices and ",
              labels.size(), " labels");
  }
  const std::string key = row.text("answerKey");
  const auto gold = std::find(labels.begin(), labels.end(), key);
  BBB_CHECK(gold != labels.end(), row.where, ": no choice has the label '", data::printable(key),
            "'");
  return make_item(question(stem), texts, gold - labels.begin());
}

// WikiHow's marks, which HellaSwag's texts still have: " [title]" ends a sentence, other brackets
// go with what they hold.
std::string without_marks(const std::string& raw) {
  std::string text = strip(raw);
  replace_all(text, " [title]", ". ");
  for (size_t open = text.find('['); open != std::string::npos; open = text.find('[', open)) {
    const size_t close = text.find(']', open);
    if (close == std::string::npos) break;
    text.erase(open, close + 1 - open);
  }
  replace_all(text, "  ", " ");
  return text;
}

// The first letter in upper case, the others in lower case. Only ASCII letters change.
std::string capitalized(std::string text) {
  const auto shift = [](char& c, char first, char last, int by) {
    if (c >= first && c <= last) c = static_cast<char>(c + by);
  };
  for (char& c : text) shift(c, 'A', 'Z', 'a' - 'A');
  if (!text.empty()) shift(text.front(), 'a', 'z', 'A' - 'a');
  return text;
}

// "ctx" is ctx_a and ctx_b joined. ctx_b is the beginning of a sentence, which the endings
// continue, or empty: then the text ends a sentence.
std::string with_capitalized_end(const std::string& ctx) {
  const std::string text = strip(ctx);
  const size_t end = text.rfind(". ");
  if (end == std::string::npos || text.find_last_of(".!?") == text.size() - 1) return text;
  return text.substr(0, end + 2) + capitalized(text.substr(end + 2));
}

TaskItem hellaswag_item(const std::string& context, Texts endings, int64_t gold) {
  for (std::string& ending : endings) ending = without_marks(ending);
  return make_item(without_marks(context), endings, gold);
}

TaskItem hellaswag_row(const Row& row) {
  const std::string context = row.has("ctx_a")
                                  ? row.text("ctx_a") + " " + capitalized(row.text("ctx_b"))
                                  : with_capitalized_end(row.text("ctx"));
  const Texts endings = row.texts("endings");
  return hellaswag_item(row.text("activity_label") + ": " + context, endings,
                        row.index("label", endings.size()));
}

// The contexts differ, the continuation is the same.
TaskItem winogrande_item(const Row& row) {
  Texts contexts;
  std::string rest;
  int64_t gold = 0;
  if (row.has("sentence")) {
    const std::string sentence = row.text("sentence"), answer = row.text("answer");
    const size_t blank = sentence.find('_');
    BBB_CHECK(blank != std::string::npos, row.where, ": no _ in \"sentence\"");
    BBB_CHECK(answer == "1" || answer == "2", row.where, ": \"answer\" is '",
              data::printable(answer), "', not 1 or 2");
    for (const char* option : {"option1", "option2"})
      contexts.push_back(sentence.substr(0, blank) + row.text(option));
    rest = sentence.substr(blank + 1);
    gold = answer == "2";
  } else {
    contexts = row.texts("context_options");
    BBB_CHECK(contexts.size() == 2, row.where, ": ", contexts.size(), " contexts, not 2");
    rest = row.text("continuation");
    gold = row.index("gold", 2);
  }
  TaskItem item;
  item.gold = gold;
  for (const std::string& context : contexts) item.choices.push_back({context, " " + strip(rest)});
  return item;
}

void check_item(const TaskItem& item, const std::string& where) {
  BBB_CHECK(item.choices.size() >= 2, where, ": fewer than two choices");
  for (const Choice& choice : item.choices) {
    BBB_CHECK(!is_blank(choice.context), where, ": an empty context");
    BBB_CHECK(choice.continuation.size() > 1, where, ": an empty choice");
  }
}

std::vector<TaskItem> read_hellaswag_text(const std::string& path) {
  constexpr size_t kLines = 6;
  Texts lines = lines_of(path);
  while (!lines.empty() && is_blank(lines.back())) lines.pop_back();
  std::vector<TaskItem> items;
  for (size_t first = 0; first < lines.size(); first += kLines) {
    const auto where = [&](size_t line) { return cat(path, ":", first + line + 1); };
    BBB_CHECK(lines.size() - first >= kLines, where(0), ": an item of ", lines.size() - first,
              " lines, not 6");
    const auto line = lines.begin() + static_cast<int64_t>(first);
    items.push_back(hellaswag_item(with_capitalized_end(line[0]), {line + 2, line + kLines},
                                   index_of_text(line[1], 4, where(1))));
    check_item(items.back(), where(0));
  }
  return items;
}

TaskItem item_of(const EvalTask& task, const Row& row) {
  if (task.name == "piqa") return piqa_item(row);
  if (task.name == "hellaswag") return hellaswag_row(row);
  if (task.name == "winogrande") return winogrande_item(row);
  return arc_item(row);
}

std::vector<TaskItem> read_jsonl(const EvalTask& task, const std::string& path) {
  // PIQA's labels are in a file of their own, if it is there.
  const std::string label_path = path.substr(0, path.rfind('.')) + "-labels.lst";
  const bool has_labels = task.name == "piqa" && std::filesystem::exists(label_path);
  const Texts labels = has_labels ? lines_of(label_path) : Texts();
  const Texts lines = lines_of(path);
  std::vector<TaskItem> items;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (is_blank(lines[i])) continue;
    const std::string where = cat(path, ":", i + 1);
    json object = data::parse_json(lines[i], where);
    if (has_labels && object.is_object() && !object.contains("label")) {
      const size_t n = items.size();
      BBB_CHECK(n < labels.size(), label_path, ": ", n, " labels, but ", where, " needs one more");
      object["label"] = index_of_text(labels[n], 2, cat(label_path, ":", n + 1));
    }
    items.push_back(item_of(task, Row{object, where}));
    check_item(items.back(), where);
  }
  BBB_CHECK(!has_labels || labels.size() <= items.size(), label_path, ": ", labels.size(),
            " labels for the ", items.size(), " items of ", path);
  return items;
}

int64_t characters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

double standard_error(double p, int64_t n) {
  return n > 1 ? std::sqrt(p * (1 - p) / static_cast<double>(n - 1)) : 0;
}

}  // namespace

const std::vector<EvalTask>& eval_tasks() {
  static const std::vector<EvalTask> tasks = {
      {"piqa", Accuracy::Plain, {"piqa_valid.jsonl", "piqa.jsonl"}},
      {"arc_easy",
       Accuracy::Normalized,
       {"arc_easy_test.jsonl", "ARC-Easy-Test.jsonl", "arc_easy.jsonl"}},
      {"arc_challenge",
       Accuracy::Normalized,
       {"arc_challenge_test.jsonl", "ARC-Challenge-Test.jsonl", "arc_challenge.jsonl"}},
      {"hellaswag",
       Accuracy::Normalized,
       {"hellaswag_val.jsonl", "hellaswag_val_full.txt", "hellaswag.jsonl"}},
      {"winogrande", Accuracy::Plain, {"winogrande_dev.jsonl", "winogrande.jsonl"}},
  };
  return tasks;
}

std::string find_task_file(const EvalTask& task, const std::string& directory) {
  for (const std::string& file : task.files) {
    const std::string path = directory + "/" + file;
    if (std::filesystem::exists(path)) return path;
  }
  return "";
}

std::vector<TaskItem> read_task(const EvalTask& task, const std::string& path) {
  std::vector<TaskItem> items =
      path.ends_with(".txt") ? read_hellaswag_text(path) : read_jsonl(task, path);
  BBB_CHECK(!items.empty(), path, ": no items");
  return items;
}

std::vector<models::ScoredTokens> encode_item(const data::Tokenizer& tokenizer,
                                              const TaskItem& item, int64_t most_tokens) {
  const auto encode = [&](const std::string& text) {
    return tokenizer.encode(text, data::SpecialText::AsText);
  };
  std::vector<models::ScoredTokens> results;
  const std::string* context = nullptr;  // the last one encoded; most items have only one
  int64_t context_tokens = 0;
  for (const Choice& choice : item.choices) {
    if (!context || *context != choice.context) {
      context = &choice.context;
      const size_t end = context->find_last_not_of(kSpaces) + 1;
      context_tokens = static_cast<int64_t>(encode(context->substr(0, end)).size());
    }
    models::ScoredTokens result;
    result.tokens = encode(choice.context + choice.continuation);
    result.scored = static_cast<int64_t>(result.tokens.size()) - context_tokens;
    if (tokenizer.add_bos() && tokenizer.bos())
      result.tokens.insert(result.tokens.begin(), *tokenizer.bos());
    const int64_t excess = static_cast<int64_t>(result.tokens.size()) - most_tokens;
    if (excess > 0) result.tokens.erase(result.tokens.begin(), result.tokens.begin() + excess);
    result.scored = std::min(result.scored, static_cast<int64_t>(result.tokens.size()) - 1);
    BBB_CHECK(result.scored > 0, "no token of '", data::printable(choice.continuation),
              "' can be scored after '", data::printable(choice.context), "'");
    results.push_back(std::move(result));
  }
  return results;
}

TaskResult score_task(const std::vector<TaskItem>& items,
                      const std::vector<double>& log_likelihoods) {
  int64_t right = 0, right_normalized = 0;
  size_t first = 0;
  for (const TaskItem& item : items) {
    std::vector<double> plain, normalized;
    BBB_ASSERT(first + item.choices.size() <= log_likelihoods.size());
    for (const Choice& choice : item.choices) {
      plain.push_back(log_likelihoods[first++]);
      normalized.push_back(plain.back() / static_cast<double>(characters(choice.continuation) - 1));
    }
    const auto best = [](const std::vector<double>& values) {
      return std::max_element(values.begin(), values.end()) - values.begin();
    };
    right += best(plain) == item.gold;
    right_normalized += best(normalized) == item.gold;
  }
  BBB_ASSERT(first == log_likelihoods.size() && !items.empty());
  TaskResult result;
  result.items = static_cast<int64_t>(items.size());
  result.acc = static_cast<double>(right) / static_cast<double>(result.items);
  result.acc_norm = static_cast<double>(right_normalized) / static_cast<double>(result.items);
  result.acc_stderr = standard_error(result.acc, result.items);
  result.acc_norm_stderr = standard_error(result.acc_norm, result.items);
  return result;
}

}  // namespace bbb::tools
