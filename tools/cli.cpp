#include "tools/cli.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <new>

#include "data/files.h"
#include "engine/cpu/thread_pool.h"
#include "tools/nearest.h"

namespace bbb::tools {

extern const char* const kBuild;  // commit, CUDA and architectures (cmake/build_text.cmake)

namespace {

void print_version() { fmt::print("bbb {} ({})\n", BBB_VERSION, kBuild); }

// Without dashes and without the value behind a "=".
std::string option_name(const std::string& argument) {
  const size_t begin = argument.find_first_not_of('-');
  return begin == argument.npos ? "" : argument.substr(begin, argument.find('=') - begin);
}

OptionTable table_of(const cxxopts::Options& options) {
  OptionTable table;
  for (const std::string& group : options.groups())
    for (const cxxopts::HelpOptionDetails& o : options.group_help(group).options)
      table.options.push_back({o.l.front(), o.s, o.desc, !o.is_boolean});
  return table;
}

}  // namespace

CommandLine::CommandLine(const std::string& command, const std::string& summary)
    : options_("bbb " + command, summary) {}

cxxopts::OptionAdder CommandLine::options(const std::string& group) {
  return options_.add_options(group);
}

bool CommandLine::parse(const Arguments& arguments) {
  options_.add_options("Every command")                                                      //
      ("device", "auto, cpu or cuda", cxxopts::value<std::string>()->default_value("auto"))  //
      ("threads", "CPU threads; 0: all cores", cxxopts::value<std::string>()->default_value("0"))(
          "h,help", "print this help")("version", "print the version");
  if (!arguments.empty() && arguments.back() == kDescribe) throw table_of(options_);
  std::vector<const char*> argv{"bbb"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  try {
    result_ = options_.parse(static_cast<int>(argv.size()), argv.data());
  } catch (const cxxopts::exceptions::no_such_option& e) {
    std::vector<std::string> names;
    for (const OptionHelp& option : table_of(options_).options) names.push_back(option.name);
    // The exception has the name only inside of its text; behind one dash, the first letter alone.
    for (const std::string& argument : arguments) {
      if (!argument.starts_with("-")) continue;
      const std::string name = option_name(argument),
                        dashes = argument.starts_with("--") ? "--" : "-",
                        named = dashes == "--" ? name : name.substr(0, 1);
      if (cat(e.what()).find("‘" + named + "’") != std::string::npos)
        throw UsageError(cat("there is no option ", dashes, name, did_you_mean(name, names, "--")));
    }
    throw UsageError(e.what());
  } catch (const cxxopts::exceptions::exception& e) {
    throw UsageError(e.what());
  }
  if (has("help")) {
    std::fputs(options_.help().c_str(), stdout);
    return false;
  }
  if (has("version")) {
    print_version();
    return false;
  }
  if (!result_.unmatched().empty())
    throw UsageError(
        cat("unexpected argument '", result_.unmatched().front(), "'; options begin with --"));
  choice("device", {"auto", "cpu", "cuda"});
  engine::set_default_threads(threads());
  return true;
}

std::string CommandLine::text(const std::string& name) const {
  return has(name) || result_[name].has_default() ? result_[name].as<std::string>() : "";
}

std::vector<std::string> CommandLine::texts(const std::string& name) const {
  std::vector<std::string> values;
  for (const cxxopts::KeyValue& option : result_.arguments())
    if (option.key() == name) values.push_back(option.value());
  return values;
}

int64_t CommandLine::integer(const std::string& name, int64_t minimum, int64_t maximum) const {
  const std::string value = text(name);
  int64_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || number < minimum ||
      number > maximum)
    throw UsageError(maximum == INT64_MAX ? cat("--", name, " takes a whole number of at least ",
                                                minimum, ", not '", value, "'")
                                          : cat("--", name, " takes a whole number from ", minimum,
                                                " to ", maximum, ", not '", value, "'"));
  return number;
}

double CommandLine::real(const std::string& name, double minimum, double maximum) const {
  const std::string value = text(name);
  double number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || !std::isfinite(number) ||
      number < minimum || number > maximum)
    throw UsageError(
        cat("--", name, " takes a number from ", minimum, " to ", maximum, ", not '", value, "'"));
  return number;
}

size_t CommandLine::choice(const std::string& name, const std::vector<std::string>& choices) const {
  const std::string value = text(name);
  std::string list;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == value) return i;
    list += (i == 0 ? "" : i + 1 == choices.size() ? " or " : ", ") + choices[i];
  }
  throw UsageError(cat("--", name, " takes ", list, ", not '", value, "'"));
}

int CommandLine::nested_bits() const {
  if (!has("bits")) return 0;
  const int bits[] = {8, 4, 3, 2};
  return bits[choice("bits", {"8", "4", "3", "2"})];
}

quant::KvFormat CommandLine::kv_format() const {
  const int bits[] = {16, 8, 4};
  return {.bits = bits[choice("kv-bits", {"16", "8", "4"})]};
}

std::string CommandLine::required(const std::string& name) const {
  if (!has(name) || text(name).empty()) throw UsageError(cat("--", name, " is missing"));
  return text(name);
}

int CommandLine::threads() const { return static_cast<int>(integer("threads", 0, 4096)); }

std::unique_ptr<engine::Backend> CommandLine::make_backend() const {
  return make_backend(text("device"), threads());
}

std::unique_ptr<engine::Backend> CommandLine::make_backend(const std::string& device, int threads,
                                                           int gpu) {
  if (device == "cuda" || (device == "auto" && engine::cuda_available()))
    return engine::make_cuda_backend(gpu);
  return engine::make_cpu_backend(threads);
}

namespace {

constexpr Command kCommands[] = {
    {"train", "train a checkpoint down to 2-bit weights", train_command},
    {"export", "write a trained run, or a rounded model, as a packed directory", export_command},
    {"ppl", "perplexity of any checkpoint on a text", ppl_command},
    {"eval", "zero-shot accuracy of any checkpoint on multiple-choice tasks", eval_command},
    {"inspect", "what a checkpoint holds, without loading its weights", inspect_command},
    {"decode", "generate text, and measure how fast", decode_command},
    {"chat", "talk to a model", chat_command},
    {"bench", "time training steps, packed products, decoding and prefill", bench_command,
     "train gemv gemm decode prefill"},
    {"tokenize", "token ids of a text", tokenize_command},
    {"report", "a run as one HTML page", report_command},
    {"completion", "a script that completes commands and options in a shell", completion_command,
     "bash zsh fish"},
};

std::string usage() {
  std::string out = "usage: bbb COMMAND [options]      bbb COMMAND --help\n\n";
  for (const Command& command : kCommands)
    out += fmt::format("  {:<11}{}\n", command.name, command.summary);
  return out + "\n  --version, --help\n";
}

int dispatch(int argc, char** argv) {
  if (argc < 2) throw UsageError("no command given; bbb --help lists them");
  const std::string name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") {
    std::fputs(usage().c_str(), stdout);
    return 0;
  }
  if (name == "--version") {
    print_version();
    return 0;
  }
  for (const Command& command : kCommands)
    if (name == command.name) return command.run(Arguments(argv + 2, argv + argc));
  std::vector<std::string> names = {"--help", "--version"};
  for (const Command& command : kCommands) names.push_back(command.name);
  const std::string near = did_you_mean(name, names);
  throw UsageError(
      cat("unknown command '", name, "'", near.empty() ? "; bbb --help lists them" : near));
}

}  // namespace

std::span<const Command> commands() { return kCommands; }

void check_writable(const CommandLine& line, const char* option) {
  if (!line.has(option)) return;
  const std::string path = line.text(option);
  for (const char* input :
       {"model", "text", "text-file", "prompts", "messages", "before", "after"}) {
    std::error_code error;
    if (line.has(input) && std::filesystem::equivalent(path, line.text(input), error))
      throw UsageError(cat("--", option, " is the same file as --", input));
  }
  const data::AtomicFile probe(path);
}

int run(int argc, char** argv) {
  try {
    const int code = dispatch(argc, argv);
    // If stdout is a file, a full disk is an error like any other.
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      throw Error("cannot write to standard output");
    return code;
  } catch (const UsageError& e) {
    std::fprintf(stderr, "bbb: %s\n", e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("bbb: out of memory on the host\n", stderr);
    return 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bbb: %s\n", e.what());
    return 1;
  }
}

}  // namespace bbb::tools
