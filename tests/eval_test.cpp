// bbb eval: task files to prompts, tokens of a choice, log-likelihoods, accuracies.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <utility>

#include "data/files.h"
#include "models/likelihood.h"
#include "tests/support.h"
#include "tests/tiny_model.h"
#include "tools/eval_tasks.h"

namespace bbb::tests {

using Catch::Contains;
using models::ScoredTokens;
using tools::Choice;
using tools::TaskItem;
using Texts = std::vector<std::string>;

namespace {

const tools::EvalTask& task_named(const std::string& name) {
  for (const tools::EvalTask& task : tools::eval_tasks())
    if (task.name == name) return task;
  throw Error("no task " + name);
}

// The items of a task whose file has this content.
std::vector<TaskItem> items_of(const std::string& task, const std::string& file,
                               const std::string& content) {
  const TempDir dir;
  data::write_file_atomic(dir / file, content);
  return tools::read_task(task_named(task), dir / file);
}

std::vector<TaskItem> items_of(const std::string& task, const std::string& content) {
  return items_of(task, "a.jsonl", content);
}

void check_choices(const TaskItem& item, int64_t gold, const Texts& contexts,
                   const Texts& continuations) {
  CHECK(item.gold == gold);
  REQUIRE(item.choices.size() == continuations.size());
  for (size_t i = 0; i < continuations.size(); ++i) {
    CHECK(item.choices[i].context == contexts[contexts.size() == 1 ? 0 : i]);
    CHECK(item.choices[i].continuation == continuations[i]);
  }
}

ScoredTokens encode_one(const data::Tokenizer& tokenizer, const Choice& choice,
                        int64_t most_tokens) {
  return tools::encode_item(tokenizer, {{choice}, 0}, most_tokens)[0];
}

std::unique_ptr<models::Llama> load_model(const std::string& path) {
  const auto source = models::open_checkpoint(path);
  auto model = std::make_unique<models::Llama>(backend(), *source, models::HeadRounding::None);
  model->load_blocks(*source);
  return model;
}

// By a softmax written out over the logits of this sequence alone.
double direct_log_likelihood(models::Llama& model, const ScoredTokens& sequence) {
  const int64_t vocab = model.config().vocab;
  const std::vector<int32_t>& tokens = sequence.tokens;
  const std::vector<double> logits = logits_of(model, {tokens.begin(), tokens.end() - 1});
  const int64_t inputs = static_cast<int64_t>(tokens.size()) - 1;
  double sum = 0;
  for (int64_t t = inputs - sequence.scored; t < inputs; ++t) {
    const double* row = logits.data() + t * vocab;
    double total = 0;
    for (int64_t v = 0; v < vocab; ++v) total += std::exp(row[v]);
    sum += row[tokens[static_cast<size_t>(t + 1)]] - std::log(total);
  }
  return sum;
}

// A batch of another shape may sum its products in another order, so activations, which are rounded
// about ten times a layer, differ in last bits. This is the relative error of the logits that
// llama_test allows, times 4: most logits of the tiny model are smaller than that.
double tolerance(const ScoredTokens& sequence) {
  const double logit =
      backend().act() == DType::BF16 ? 6 * epsilon_of(DType::BF16) : 64 * epsilon_of(DType::F32);
  return 4 * logit * static_cast<double>(sequence.scored);
}

ScoredTokens random_sequence(uint64_t seed, int64_t length, int64_t scored) {
  return {random_tokens(seed, length, tiny_config().vocab), scored};
}

}  // namespace

TEST_CASE("eval: forms of PIQA", "[eval]") {
  const Texts context = {"Question: go?\nAnswer:"}, choices = {" a ", " b"};
  const std::string row = R"({"goal": "go?", "sol1": "a ", "sol2": "b")";
  check_choices(items_of("piqa", row + R"(, "label": 1})")[0], 1, context, choices);
  check_choices(items_of("piqa", row + R"(, "label": "0"})")[0], 0, context, choices);

  const TempDir dir;
  const auto read = [&](const std::string& lines, const std::string& labels) {
    data::write_file_atomic(dir / "p.jsonl", lines);
    data::write_file_atomic(dir / "p-labels.lst", labels);
    return tools::read_task(task_named("piqa"), dir / "p.jsonl");
  };
  const std::string line = row + "}\n";
  const std::vector<TaskItem> items = read(line + "\r\n" + line, "1\r\n0\n");
  REQUIRE(items.size() == 2);
  check_choices(items[0], 1, context, choices);
  check_choices(items[1], 0, context, choices);
  CHECK_THROWS_WITH(read(line + line, "1\n2\n"), Contains("p-labels.lst:2: '2'"));
  CHECK_THROWS_WITH(read(line + line, "1\n"), Contains("p-labels.lst: 1 labels"));
  CHECK_THROWS_WITH(read(line, "1\n0\n"), Contains("p-labels.lst: 2 labels"));
  CHECK_THROWS_WITH(items_of("piqa", line), Contains("a.jsonl:1: no \"label\""));
}

TEST_CASE("eval: forms of ARC", "[eval]") {
  const Texts context = {"Question: Why?\nAnswer:"}, choices = {" x", " y", " z"};
  const std::string released =
      R"({"question": {"stem": "Why?", "choices": [{"text": "x", "label": "A"},)"
      R"( {"text": "y", "label": "B"}, {"text": "z", "label": "C"}]}, "answerKey": "C"})";
  const std::string columns =
      R"({"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},)"
      R"( "answerKey": "2"})";
  const std::string query =
      R"({"query": "Question: Why?\nAnswer:", "choices": ["x", "y", "z"], "gold": 0})";
  for (const char* task : {"arc_easy", "arc_challenge"}) {
    const std::vector<TaskItem> items =
        items_of(task, released + "\n" + columns + "\n" + query + "\n");
    REQUIRE(items.size() == 3);
    check_choices(items[0], 2, context, choices);
    check_choices(items[1], 1, context, choices);
    check_choices(items[2], 0, context, choices);
  }
  CHECK_THROWS_WITH(
      items_of("arc_easy", query + "\n" + columns.substr(0, columns.size() - 3) + "4\"}\n"),
      Contains("a.jsonl:2: no choice has the label '4'"));
}

TEST_CASE("eval: forms of HellaSwag", "[eval]") {
  // The end of the context becomes the beginning of a sentence; WikiHow's marks go.
  const Texts endings = {" a. b", " c d", " e", " f"};
  const std::string list = R"("endings": ["a [title]b", "c [step] d", " e ", "f"])";
  const std::string row = R"({"activity_label": "Roof", )" + list;
  const Texts context = {"Roof: A man sits. He"};
  check_choices(
      items_of("hellaswag", row + R"(, "ctx_a": "A man sits.", "ctx_b": "hE", "label": 3})")[0], 3,
      context, endings);
  check_choices(items_of("hellaswag", row + R"(, "ctx": "A man sits. he", "label": "2"})")[0], 2,
                context, endings);
  check_choices(
      items_of("hellaswag",
               row + R"(, "ctx_a": "[header] How to [title] Go.", "ctx_b": "", "label": 0})")[0],
      0, {"Roof: How to. Go."}, endings);

  const std::string text = "Roof: A man sits. he\n3\na [title]b\nc [step] d\n e \nf\n";
  const std::string ended = "Home: See e.g. that.\n1\nA\nB\nC\nD\n";
  const std::vector<TaskItem> items = items_of("hellaswag", "a.txt", text + ended);
  REQUIRE(items.size() == 2);
  check_choices(items[0], 3, context, endings);
  check_choices(items[1], 1, {"Home: See e.g. that."}, {" A", " B", " C", " D"});
  CHECK_THROWS_WITH(items_of("hellaswag", "a.txt", text + "x\n4\na\nb\nc\nd\n"),
                    Contains("a.txt:8: '4'"));
  CHECK_THROWS_WITH(items_of("hellaswag", "a.txt", text + "x\n1\na\n"),
                    Contains("a.txt:7: an item of 3 lines"));
  CHECK_THROWS_WITH(items_of("hellaswag", "a.txt", text + "x\n1\na\nb\n\nd\n"),
                    Contains("a.txt:7: an empty choice"));
}

TEST_CASE("eval: forms of WinoGrande", "[eval]") {
  const Texts contexts = {"So Ann", "So Bea"}, rest = {" won.", " won."};
  const std::string row = R"({"sentence": "So _ won. ", "option1": "Ann", "option2": "Bea")";
  check_choices(items_of("winogrande", row + R"(, "answer": "2"})")[0], 1, contexts, rest);
  for (const char* continuation : {"won.", " won."})
    check_choices(items_of("winogrande", R"({"context_options": ["So Ann", "So Bea"], )"
                                         R"("gold": 0, "continuation": ")" +
                                             std::string(continuation) + "\"}")[0],
                  0, contexts, rest);
  CHECK_THROWS_WITH(items_of("winogrande", row + R"(, "answer": ""})"),
                    Contains("a.jsonl:1: \"answer\""));
}

TEST_CASE("eval: malformed lines are named", "[eval]") {
  const std::string good = R"({"query": "q", "choices": ["x", "y"], "gold": 0})";
  for (const std::string bad :
       {"{", "[1]", "3", R"({"query": "q"})", R"({"query": 1, "choices": ["x", "y"], "gold": 0})",
        R"({"query": "q", "choices": ["x", 2], "gold": 0})",
        R"({"query": "q", "choices": ["x"], "gold": 0})",
        R"({"query": "q", "choices": ["x", ""], "gold": 0})",
        R"({"query": " ", "choices": ["x", "y"], "gold": 0})",
        R"({"query": "q", "choices": ["x", "y"], "gold": 2})",
        R"({"query": "q", "choices": ["x", "y"], "gold": -1})",
        R"({"query": "q", "choices": ["x", "y"], "gold": 0.5})",
        R"({"query": "q", "choices": ["x", "y"], "gold": null})",
        R"({"question": {"stem": "q", "choices": 1}, "answerKey": "A"})",
        R"({"question": "q", "choices": {"text": ["x"], "label": []}, "answerKey": "A"})"}) {
    CAPTURE(bad);
    CHECK_THROWS_WITH(items_of("arc_easy", good + "\n\n" + bad + "\n"), Contains("a.jsonl:3: "));
    CHECK_THROWS_WITH(items_of("winogrande", bad + "\n"), Contains("a.jsonl:1: "));
    CHECK_THROWS_WITH(items_of("piqa", bad + "\n"), Contains("a.jsonl:1: "));
    CHECK_THROWS_WITH(items_of("hellaswag", bad + "\n"), Contains("a.jsonl:1: "));
  }
  CHECK_THROWS_WITH(items_of("piqa", "\n"), Contains("a.jsonl: no items"));
}

TEST_CASE("eval: the tokens of a choice", "[eval]") {
  const std::string folder = golden_folder() + "/tokenizers/";
  for (const char* name : {"gpt2", "llama3", "sentencepiece"}) {
    CAPTURE(name);
    const auto tokenizer = data::load_tokenizer(folder + name);
    const auto encode = [&](const std::string& text) {
      return tokenizer->encode(text, data::SpecialText::AsText);
    };
    const std::vector<int32_t> context = encode("Hello world"), whole = encode("Hello world again");
    std::vector<int32_t> expected = whole;
    if (tokenizer->add_bos()) expected.insert(expected.begin(), *tokenizer->bos());
    const size_t scored = whole.size() - context.size();
    const Choice choice = {"Hello world", " again"};

    const ScoredTokens all = encode_one(*tokenizer, choice, 100);
    CHECK(all.tokens == expected);
    CHECK(all.scored == static_cast<int64_t>(scored));
    // The same split for a space at the end of the context.
    const ScoredTokens moved = encode_one(*tokenizer, {"Hello world ", "again"}, 100);
    CHECK(moved.tokens == expected);
    CHECK(moved.scored == all.scored);
    // Tokens are cut from the left; the first that is left has nothing before it.
    const ScoredTokens cut = encode_one(*tokenizer, choice, 2);
    CHECK(cut.tokens == std::vector<int32_t>(expected.end() - 2, expected.end()));
    CHECK(cut.scored == 1);
    // Contexts that differ, and one that comes again.
    const Choice other = {"Hello", " again and again"};
    const auto several = tools::encode_item(*tokenizer, {{choice, choice, other, choice}, 0}, 100);
    REQUIRE(several.size() == 4);
    for (const size_t i : {0, 1, 3}) CHECK(several[i].tokens == expected);
    for (const size_t i : {0, 1, 3}) CHECK(several[i].scored == all.scored);
    CHECK(several[2].scored == encode_one(*tokenizer, other, 100).scored);
    CHECK_THROWS_WITH(encode_one(*tokenizer, {"Hello world", ""}, 100), Contains("Hello world"));
  }
}

TEST_CASE("eval: log-likelihoods against a softmax written out", "[eval]") {
  const TempDir dir;
  write_tiny_model(dir.path(), tiny_config(), 1);
  const auto model = load_model(dir.path());
  const std::vector<ScoredTokens> sequences = {
      random_sequence(1, 9, 3),   random_sequence(2, 2, 1),  random_sequence(3, 33, 32),
      random_sequence(4, 9, 8),   random_sequence(5, 17, 1), random_sequence(6, 128, 60),
      random_sequence(7, 100, 9), random_sequence(8, 3, 2)};
  int64_t reported = 0;
  const std::vector<double> together =
      models::log_likelihoods(*model, sequences, [&](int64_t done) { reported = done; });
  CHECK(reported == static_cast<int64_t>(sequences.size()));
  REQUIRE(together.size() == sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    CAPTURE(i);
    const double direct = direct_log_likelihood(*model, sequences[i]);
    CHECK(direct < -1);
    CHECK(std::abs(together[i] - direct) < tolerance(sequences[i]));
    const double alone = models::log_likelihoods(*model, {sequences[i]}, nullptr)[0];
    CHECK(std::abs(together[i] - alone) < tolerance(sequences[i]));
  }

  // More than one batch: each sequence keeps its place.
  std::vector<ScoredTokens> many;
  for (int i = 0; i < 40; ++i) many.push_back(sequences[static_cast<size_t>(i) % 8]);
  const std::vector<double> results = models::log_likelihoods(*model, many, nullptr);
  for (size_t i = 0; i < many.size(); ++i)
    CHECK(std::abs(results[i] - together[i % 8]) < tolerance(many[i]));

  CHECK(models::log_likelihoods(*model, {}, nullptr).empty());
  CHECK_THROWS_WITH(models::log_likelihoods(*model, {{{1, 53}, 1}}, nullptr), Contains("token 53"));
}

TEST_CASE("eval: accuracies and their errors", "[eval]") {
  // Lengths 1 and 2 characters, the second of 4 bytes.
  const Choice one = {"q", " a"}, two = {"q", " \xC3\xA9\xC3\xA9"};
  const std::vector<TaskItem> items = {
      {{one, two}, 0}, {{one, two}, 1}, {{two, one}, 0}, {{one, one}, 0}};
  // Plain: right, wrong, right, right (the first of equals). Per character: wrong (-3 < -2), right,
  // right, right.
  const tools::TaskResult result = tools::score_task(items, {-3, -4, -3, -4, -1, -5, -2, -2});
  CHECK(result.items == 4);
  CHECK(result.acc == 0.75);
  CHECK(result.acc_norm == 0.75);
  CHECK(result.acc_stderr == Approx(std::sqrt(0.75 * 0.25 / 3)));
  CHECK(result.acc_norm_stderr == result.acc_stderr);
  CHECK(tools::score_task({items[0]}, {-1, -4}).acc_stderr == 0);
  // Per character the first is better, per byte the second would be.
  CHECK(tools::score_task({items[0]}, {-3, -8}).acc_norm == 1);
}

// A model in which byte b + 1 follows byte b: embeddings are so large that attention and MLP hardly
// change them, and the head's row of a byte is the embedding of the byte before it.
TEST_CASE("eval: a task whose answers a model knows", "[eval]") {
  const TempDir dir;
  models::LlamaConfig config = tiny_config();
  config.vocab = 256;
  write_tiny_model(dir.path(), config, 1);
  const auto model = load_model(dir.path());
  const auto tokenizer = data::load_tokenizer("synthetic:smollm2-135m");
  engine::Rng rng(3);
  std::vector<double> table(static_cast<size_t>(config.vocab * config.d_model));
  for (double& value : table) value = rng.below(2) ? 64 : -64;
  const Tensor& embedding = model->embedding();
  const Shape shape = {config.vocab, config.d_model};
  backend().copy(embedding, make(backend(), shape, embedding.dtype(), table));
  for (double& value : table) value /= 64;
  std::rotate(table.begin(), table.end() - config.d_model, table.end());
  backend().copy(model->head(), make(backend(), shape, embedding.dtype(), table));

  // After the space of every choice comes '!'.
  const std::vector<TaskItem> items = items_of(
      "arc_easy", R"({"query": "Question: a\nAnswer:", "choices": ["abc", "!\"#", "cba"], "gold": 1}
{"query": "Question: b\nAnswer:", "choices": ["!\"#$%", "%$#\"!"], "gold": 0}
{"query": "Question: c\nAnswer:", "choices": ["!", "?"], "gold": 1})");
  std::vector<ScoredTokens> sequences;
  for (const TaskItem& item : items)
    for (const ScoredTokens& choice : tools::encode_item(*tokenizer, item, config.max_position + 1))
      sequences.push_back(choice);
  const tools::TaskResult result =
      tools::score_task(items, models::log_likelihoods(*model, sequences, nullptr));
  CHECK(result.items == 3);
  CHECK(result.acc == Approx(2.0 / 3));
  CHECK(result.acc_norm == Approx(2.0 / 3));
}

TEST_CASE("eval: the whole files", "[eval]") {
  const std::pair<const char*, size_t> tasks[] = {
      {"piqa", 1838}, {"arc_easy", 2376}, {"hellaswag", 10042}, {"winogrande", 1267}};
  const std::string first = data_file("piqa_valid.jsonl");
  if (first.empty()) return;
  for (const auto& [name, count] : tasks) {
    CAPTURE(name);
    const std::string path =
        tools::find_task_file(task_named(name), first.substr(0, first.rfind('/')));
    REQUIRE(!path.empty());
    const std::vector<TaskItem> items = tools::read_task(task_named(name), path);
    CHECK(items.size() == count);
    if (std::string(name) == "hellaswag")
      CHECK(items[0].choices[3].context == "Roof shingle removal: A man is sitting on a roof. He");
  }
}

}  // namespace bbb::tests
