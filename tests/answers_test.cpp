// What `bbb train`, `ppl`, `decode` and `export` say and accept beside their results: runs of the
// commands on a tiny model with a text.
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/files.h"
#include "tests/model_files.h"
#include "tests/printed.h"
#include "tests/tiny_run.h"
#include "tools/cli.h"
#include "train/config_table.h"
#include "train/run_directory.h"
#include "train/summary.h"
#include "train/train.h"

namespace bbb::tests {

using Catch::Contains;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

// A random model of 128 positions with a tokenizer, and texts.
struct TextModel {
  TempDir dir;

  TextModel() {
    const std::string tokenizer = golden_folder() + "/tokenizers/gpt2/";
    models::LlamaConfig config = tiny_config();
    config.vocab = data::load_tokenizer(tokenizer)->vocab_size();
    fs::create_directory(dir / "model");
    write_tiny_model(dir / "model", config, 3);
    for (const char* name : {"tokenizer.json", "tokenizer_config.json"})
      data::write_file_atomic(dir / "model/" + name, data::read_file(tokenizer + name));
    std::string text;
    for (int i = 0; i < 700; ++i) text += cat("number ", i, " ");
    write_plain(dir / "text.txt", text);
    write_plain(dir / "short.txt", "a few words, and a few more");
  }

  tools::Arguments command(const char* name, const tools::Arguments& more) const {
    tools::Arguments all = {name, "--device", on_cuda() ? "cuda" : "cpu"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Output train(const std::string& out, const tools::Arguments& more,
               const char* text = "text.txt") const {
    tools::Arguments all = {"--model", dir / "model", "--data",         dir / text,
                            "--out",   dir / out,     "--deterministic"};
    all.insert(all.end(), more.begin(), more.end());
    return bbb(command("train", all));
  }
};

const tools::Arguments kQuick = {"--seq-len", "32", "--samples", "8", "--e2e-steps", "2"};

}  // namespace

TEST_CASE("answers: a run with the defaults alone suits a short text and ends with what it made",
          "[answers]") {
  const TextModel model;
  for (const tools::Arguments& options :
       {tools::Arguments{"--e2e-steps", "2"}, tools::Arguments{"--e2e-steps", "0", "--epochs", "1"},
        tools::Arguments{"--e2e-steps", "1", "--samples", "3"}}) {
    const std::string name = cat("run", options.size(), options[1]);
    const Output run = model.train(name, options, "short.txt");
    INFO(run.out << run.err);
    REQUIRE(run.code == 0);
    CHECK_THAT(run.out, Contains("to fit the text (") && Contains("--seq-len "));
    CHECK_THAT(run.out, Contains("bits per weight\n"));
    CHECK_THAT(run.out, Contains("in full precision "));
    CHECK_THAT(run.out, Contains("time: "));
    CHECK_THAT(run.out, Contains("next: bbb export --run " + model.dir / name));
    CHECK(model.train(name, options, "short.txt").code == 0);  // finished already
  }
}

TEST_CASE("answers: the summary's perplexities are those of bbb ppl", "[answers]") {
  const TextModel model;
  // Grids with splits, rotations and quantized activations; trained scales; trained tables.
  for (const tools::Arguments& options :
       {tools::Arguments{"--ocs-ratio", "0.1", "--e2e-stages", "w2a8:1"},
        tools::Arguments{"--e2e-train", "scales", "--range", "minmax"},
        tools::Arguments{"--e2e-embedding", "train", "--any-precision", "8,4,2"}}) {
    tools::Arguments all = {"--seq-len",   "32", "--val-samples", "4",
                            "--e2e-batch", "4",  "--samples",     "8"};
    all.insert(all.end(), options.begin(), options.end());
    if (options[0] != "--ocs-ratio") all.insert(all.end(), {"--e2e-steps", "2"});
    const std::string name = options[1];
    const Output run = model.train(name, all);
    INFO(run.out << run.err);
    REQUIRE(run.code == 0);
    double result = 0, full = 0, bits = 0;
    REQUIRE(std::sscanf(run.out.c_str() + run.out.find("perplexity on"),
                        "perplexity on 4 validation windows of 32 tokens: %lf, in full precision "
                        "%lf",
                        &result, &full) == 2);
    const std::string made = model.dir / name + ": ";
    REQUIRE(std::sscanf(run.out.c_str() + run.out.find("\n" + made) + 1 + made.size(), "%lf",
                        &bits) == 1);
    const Output exported = bbb(
        model.command("export", {"--run", model.dir / name, "--out", model.dir / "made/" + name}));
    INFO(exported.err);
    REQUIRE(exported.code == 0);

    // The validation windows as a text of their own tokens.
    const auto source = models::open_checkpoint(model.dir / "model");
    const auto tokenizer = data::load_tokenizer(model.dir / "model");
    train::TrainConfig config;
    config.data = model.dir / "text.txt";
    const data::Windows windows = data::make_windows(
        train::training_tokens(*source, *tokenizer, config), 32, config.data, config.pack);
    const std::vector<int32_t> ids(windows.ids.end() - 4 * 32, windows.ids.end());
    const auto measured = [&](const std::string& path) {
      const auto checkpoint = models::open_checkpoint(path);
      models::Llama llama(backend(), *checkpoint, models::HeadRounding::None);
      llama.load_blocks(*checkpoint);
      return models::perplexity(llama, ids, 4, 32, nullptr).perplexity;
    };
    CHECK(full == Approx(measured(model.dir / "model")).epsilon(1e-3));
    CHECK(result == Approx(measured(model.dir / "made/" + name)).epsilon(1e-3));
    CHECK(bits == Approx(models::open_checkpoint(model.dir / "made/" + name)->bits_per_weight())
                      .epsilon(1e-3));
  }
}

TEST_CASE("answers: a finished run stays one where its perplexity is no number", "[answers]") {
  Fixture fixture;
  fixture.poison_last_token();
  fixture.windows.ids.back() = Fixture::kPoisoned;  // in the last validation window
  train::TrainConfig config = fixture.config;
  config.out = fixture.dir / "run";
  config.e2e_steps = 1;
  const std::string text = printed_by([&] {
                             train::train_windows(backend(), *fixture.source, fixture.windows,
                                                  config, train::Observer());
                           }).out;
  CHECK_THAT(text, Contains("no perplexity: the loss of window 3 "));
  CHECK_THAT(text, Contains("next: bbb export"));
  config.val_samples = 0;
  config.out = fixture.dir / "without";
  CHECK_THAT(printed_by([&] {
               train::train_windows(backend(), *fixture.source, fixture.windows, config,
                                    train::Observer());
             }).out,
             Contains("no perplexity: there are no validation windows\n"));
}

TEST_CASE("answers: the next commands name the export beside the run, as words of a shell",
          "[answers]") {
  train::TrainConfig config;
  config.out = "runs/a//";
  config.bits = 2;
  config.act_bits = 8;
  CHECK_THAT(train::next_commands(config), Contains("--run runs/a --out runs/a-w2a8\n") &&
                                               Contains("--model runs/a-w2a8 --text"));
  config.out = "it's mine/";
  CHECK_THAT(train::next_commands(config),
             Contains(R"(--run 'it'\''s mine' --out 'it'\''s mine-w2a8')"));
}

TEST_CASE("answers: a dry run says memory, disk and time, and leaves nothing behind", "[answers]") {
  const TextModel model;
  for (const tools::Arguments& options :
       {tools::Arguments{"--e2e-steps", "20"},
        tools::Arguments{"--stages", "w4a16,w2a8", "--e2e-stages", "w2a8:2,w2a4:1"},
        tools::Arguments{"--stages", "w4a16,w2a16", "--block-schedule", "prefix"}}) {
    tools::Arguments all = {"--seq-len", "32", "--samples", "8", "--dry-run"};
    all.insert(all.end(), options.begin(), options.end());
    const Output run = model.train("a/run", all);
    INFO(run.out << run.err);
    REQUIRE(run.code == 0);
    CHECK_THAT(run.out, Contains("GB of tensors") && Contains("results: ") &&
                            Contains("GB are free\ntime: about ") &&
                            Contains("nothing was written\n"));
    CHECK((run.out.find("blocks ") != run.out.npos) ==
          (options[0] == "--stages" && options[2] != "--block-schedule"));
    CHECK_THAT(run.out, Contains(" steps of "));
    CHECK_FALSE(fs::exists(model.dir / "a"));
  }
}

TEST_CASE("answers: a run continues with the threads and from the paths with which it began",
          "[answers]") {
  const TextModel model;
  const fs::path here = fs::current_path();
  fs::current_path(model.dir.path());
  tools::Arguments quick = kQuick;
  quick.insert(quick.end(), {"--threads", "1"});
  tools::Arguments relative = {
      "train", "--model", "model",           "--data",   "./text.txt",
      "--out", "run",     "--deterministic", "--device", on_cuda() ? "cuda" : "cpu"};
  relative.insert(relative.end(), quick.begin(), quick.end());
  const Output begun = bbb(relative);
  fs::current_path(here);
  INFO(begun.err);
  REQUIRE(begun.code == 0);
  const train::RunDirectory run(model.dir / "run");
  CHECK(run.identity().config.model == model.dir / "model");
  CHECK(run.identity().config.data == model.dir / "text.txt");
  CHECK(run.identity().config.threads == 1);

  const auto again = [&](const tools::Arguments& more) {
    fs::remove(run.final_file());  // unfinished
    tools::Arguments all = kQuick;
    all.insert(all.end(), more.begin(), more.end());
    return model.train("run", all);
  };
  const std::string result = data::read_file(run.final_file());
  const Output dry = again({"--dry-run"});
  INFO(dry.err);
  CHECK(dry.code == 0);
  CHECK_THAT(dry.out, Contains("time, each phase from its start: about "));
  const Output resumed = again({});
  INFO(resumed.err);
  CHECK(resumed.code == 0);
  CHECK_THAT(resumed.out, Contains("since the run was resumed"));
  CHECK((data::read_file(run.final_file()) == result));
  if (!on_cuda()) {
    const Output other = again({"--threads", "2"});
    CHECK(other.code == 1);
    CHECK_THAT(other.err, Contains("give --threads 1"));
  }
}

TEST_CASE("answers: a finished run is extended with its model, text and grid", "[answers]") {
  const TextModel model;
  tools::Arguments first = kQuick;
  first.insert(first.end(), {"--group-size", "64", "--rotate", "none"});
  REQUIRE(model.train("first", first).code == 0);
  const Output next = bbb(model.command(
      "train", {"--from", model.dir / "first", "--out", model.dir / "next", "--e2e-steps", "1"}));
  INFO(next.out << next.err);
  REQUIRE(next.code == 0);
  const train::TrainConfig config = train::RunDirectory(model.dir / "next").identity().config;
  CHECK(config.model == model.dir / "model");
  CHECK(config.data == model.dir / "text.txt");
  CHECK(config.seq_len == 32);
  CHECK(config.samples == 8);
  CHECK(config.group == 64);
  CHECK(config.rotate == train::Rotate::None);
  const Output absent = bbb({"train", "--from", model.dir / "none", "--out", model.dir / "x"});
  CHECK(absent.code == 1);
  CHECK_THAT(absent.err, Contains("none: no training run"));
}

TEST_CASE("answers: ppl takes windows that suit text and model, and warns beyond its positions",
          "[answers]") {
  const TextModel model;
  const auto ppl = [&](const char* text, const tools::Arguments& more) {
    tools::Arguments all = {"--model",        model.dir / "model", "--text",
                            model.dir / text, "--max-windows",     "1"};
    all.insert(all.end(), more.begin(), more.end());
    return bbb(model.command("ppl", all));
  };
  const Output shorter = ppl("short.txt", {});
  CHECK(shorter.code == 0);
  CHECK_THAT(shorter.err, Contains("instead of 2048, to fit the text\n"));
  const Output positions = ppl("text.txt", {});
  CHECK(positions.code == 0);
  CHECK_THAT(positions.err,
             Contains("--seq-len 128 instead of 2048, to fit the model's positions"));
  const Output beyond = ppl("text.txt", {"--seq-len", "160"});
  CHECK(beyond.code == 0);
  CHECK_THAT(beyond.err, Contains("beyond the model's 128 positions"));
  const Output within = ppl("text.txt", {"--seq-len", "128"});
  CHECK_THAT(within.err, !Contains("positions"));
  CHECK(ppl("short.txt", {"--seq-len", "128"}).code == 1);
}

TEST_CASE("answers: decoding says when the context is full", "[answers]") {
  const TextModel model;
  // No token ends a text: neither a setting nor a name makes one.
  data::write_file_atomic(model.dir / "model/tokenizer_config.json",
                          R"({"bos_token": null, "eos_token": null})");
  const std::string tokenizer = model.dir / "model/tokenizer.json";
  std::string vocabulary = data::read_file(tokenizer);
  for (const std::string name : {"<|endoftext|>", "<|im_end|>"})
    for (size_t at; (at = vocabulary.find(name)) != std::string::npos;)
      vocabulary.replace(at, 2, "<!");
  data::write_file_atomic(tokenizer, vocabulary);
  write_plain(model.dir / "prompts.jsonl.gz", "{\"prompt\": \"one\"}\n{\"prompt\": \"two\"}\n");
  const auto decode = [&](const tools::Arguments& more) {
    tools::Arguments all = {"--model", model.dir / "model", "--json", model.dir / "out.json"};
    all.insert(all.end(), more.begin(), more.end());
    const Output output = bbb(model.command("decode", all));
    INFO(output.err);
    REQUIRE(output.code == 0);
    // The text ends before the report begins.
    CHECK(output.out.ends_with("\n"));
    return std::pair(output.err, json::parse(data::read_file(model.dir / "out.json")));
  };
  const auto [full, one] = decode({"--prompt", "one", "--max-tokens", "500"});
  CHECK_THAT(full, Contains("the context of 128 tokens is full\n"));
  CHECK(one["stopped"] == "context");
  const auto [room, two] = decode({"--prompt", "one", "--max-tokens", "5"});
  CHECK_THAT(room, !Contains("is full"));
  CHECK(two["stopped"] == "max-tokens");
  const auto [list, texts] =
      decode({"--prompts", model.dir / "prompts.jsonl.gz", "--max-tokens", "500"});
  for (const json& text : texts["sequences"]) CHECK(text["stopped"] == "context");
  CHECK_THAT(list, Contains("texts that end early: 2; the context of 128 tokens is full\n"));
}

TEST_CASE("answers: an export makes parents and removes leftovers", "[answers]") {
  const TextModel model;
  const auto rounded = [&](const std::string& out, const char* format) {
    return bbb(model.command("export", {"--model", model.dir / "model", "--rtn", "--format", format,
                                        "--out", model.dir / out}));
  };
  for (const auto& [format, out] :
       {std::pair{"bbb", "a/b/model"}, {"gguf", "a/c/model.gguf"}, {"hf", "a/d/e/model"}}) {
    const fs::path path = model.dir / out;
    fs::create_directories(path.parent_path());
    write_plain(path.string() + ".tmp-1-0", "half");
    const Output output = rounded(out, format);
    INFO(output.err);
    CHECK(output.code == 0);
    CHECK(fs::exists(path));
    CHECK_FALSE(fs::exists(path.string() + ".tmp-1-0"));
    CHECK(rounded(cat("new/", format, "/model"), format).code == 0);
  }
  // Windows and positions give way here, too.
  const Output searched =
      bbb(model.command("export", {"--model", model.dir / "model", "--rtn", "--range", "search",
                                   "--data", model.dir / "short.txt", "--out", model.dir / "s"}));
  INFO(searched.err);
  CHECK(searched.code == 0);
  CHECK_THAT(searched.out, Contains("to fit the text"));
}

}  // namespace bbb::tests
