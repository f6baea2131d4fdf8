// Shared by all bbb commands: options, the choice of backend, and the handling of errors.
#pragma once

#include <cxxopts.hpp>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace bbb::tools {

// The arguments after the command's name.
using Arguments = std::vector<std::string>;

// One option, for shell completion.
struct OptionHelp {
  std::string name, letter, text;  // without dashes; letter: "" if it has none
  bool takes_value = true;
};
// The argument on which parse() throws the command's OptionTable. Nobody can type it.
inline const std::string kDescribe(1, '\0');
struct OptionTable {
  std::vector<OptionHelp> options;
};

// One command's options: those added by options(), then --device, --threads, --help, --version.
// Throws UsageError on an unknown flag, a bad value, or a stray word.
class CommandLine {
 public:
  CommandLine(const std::string& command, const std::string& summary);
  cxxopts::OptionAdder options(const std::string& group = "");
  // Returns false after printing --help or --version. Throws OptionTable on kDescribe.
  bool parse(const Arguments& arguments);

  bool has(const std::string& name) const { return result_.count(name) > 0; }
  std::string text(const std::string& name) const;
  // The values of an option that may be repeated, in order.
  std::vector<std::string> texts(const std::string& name) const;
  int64_t integer(const std::string& name, int64_t minimum, int64_t maximum = INT64_MAX) const;
  double real(const std::string& name, double minimum, double maximum) const;
  // The index of the value in `choices`. Throws UsageError if it is not there.
  size_t choice(const std::string& name, const std::vector<std::string>& choices) const;
  // Throws UsageError, naming the option, unless it was given and is not empty.
  std::string required(const std::string& name) const;

  // --bits of commands that read a model: the bits of a nested export, or 0.
  static constexpr const char* kNestedBitsHelp =
      "of a nested export (--any-precision): read 8, 4, 3 or 2 bits";
  int nested_bits() const;
  // --kv-bits of the same commands.
  static constexpr const char* kKvBitsHelp =
      "of keys and values in the cache: 16, or quantized to 8 or 4";
  quant::KvFormat kv_format() const;

  // The backend of --device; auto takes a GPU if there is one. Throws if --device is cuda and there
  // is none.
  std::unique_ptr<engine::Backend> make_backend() const;
  // The same with another value of --device and of --threads, on GPU `gpu` if it takes one.
  static std::unique_ptr<engine::Backend> make_backend(const std::string& device, int threads,
                                                       int gpu = 0);
  int threads() const;

 private:
  cxxopts::Options options_;
  cxxopts::ParseResult result_;
};

// Refuses the file that an option names if it cannot be written, or is what the command reads,
// before the work starts.
void check_writable(const CommandLine& line, const char* option);

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const Arguments&);
  const char* words = "";  // one of them must follow the name
};
std::span<const Command> commands();

int train_command(const Arguments& arguments);
int export_command(const Arguments& arguments);
int ppl_command(const Arguments& arguments);
int eval_command(const Arguments& arguments);
int inspect_command(const Arguments& arguments);
int decode_command(const Arguments& arguments);
int chat_command(const Arguments& arguments);
int bench_command(const Arguments& arguments);
int report_command(const Arguments& arguments);
int completion_command(const Arguments& arguments);
int tokenize_command(const Arguments& arguments);

// The whole program behind main(). Runs the command, and turns every error into one line on stderr
// and an exit code: 2 for a wrong command line, 1 for the rest.
int run(int argc, char** argv);

}  // namespace bbb::tools
