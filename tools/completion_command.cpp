// bbb completion: scripts for bash, zsh and fish that complete commands, options and words, made
// from the tables that the commands parse with.
#include <fmt/format.h>

#include <map>
#include <regex>
#include <sstream>

#include "tools/cli.h"
#include "train/config_table.h"

namespace bbb::tools {

namespace {

// A command, or a command with the word after it: "train", "bench gemv".
struct Entry {
  std::string command;
  std::vector<OptionHelp> options;
};

bool has_words(const Command& command) { return *command.words != 0; }

std::vector<Entry> entries() {
  std::vector<Entry> all;
  for (const Command& command : commands()) {
    if (command.run == completion_command) continue;  // it has no options
    const auto add = [&](const std::string& name, Arguments arguments) {
      arguments.push_back(kDescribe);
      try {
        command.run(arguments);
      } catch (const OptionTable& table) {
        all.push_back({name, table.options});
      }
    };
    if (!has_words(command)) add(command.name, {});
    std::istringstream words(command.words);
    for (std::string word; words >> word;) add(cat(command.name, " ", word), {word});
  }
  return all;
}

// The values of the options that take one of a few words.
std::map<std::string, std::string> choices() {
  std::map<std::string, std::string> words{{"device", "auto cpu cuda"}};
  const train::TrainConfig config;
  train::visit(config, [&]<typename T>(const T&, const train::Field& f) {
    if constexpr (std::is_enum_v<T>)
      if (f.group != nullptr)
        words[f.name] = std::regex_replace(f.rule.expected, std::regex(", "), " ");
  });
  return words;
}

// In single quotes. `special` get a backslash in front.
std::string quoted(const std::string& text, const std::string& special, const std::string& quote) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'')
      out += quote;
    else
      out += (special.find(c) != std::string::npos ? "\\" : "") + std::string(1, c);
  }
  return out + "'";
}

std::string bash_script() {
  std::string names = "--help --version", words, options, values;
  for (const Command& command : commands()) {
    names += fmt::format(" {}", command.name);
    if (!has_words(command)) continue;
    words += fmt::format(
        "    {0})\n      [ \"$COMP_CWORD\" = 2 ] && reply='{1}'\n      command=\"{0} "
        "${{COMP_WORDS[2]}}\" ;;\n",
        command.name, command.words);
  }
  for (const Entry& entry : entries()) {
    std::string list;
    for (const OptionHelp& o : entry.options) list += " --" + o.name;
    options += fmt::format("    '{}') options='{}' ;;\n", entry.command, list.substr(1));
  }
  for (const auto& [option, list] : choices())
    values += fmt::format("    --{}) reply='{}' ;;\n", option, list);
  return fmt::format(
      R"(# bash completion of bbb, by `bbb completion bash`. Files complete where nothing else does.
_bbb() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
  local command=${{COMP_WORDS[1]}} reply= options=
  COMPREPLY=()
  [ "$word" = = ] && word=
  [ "$before" = = ] && before=${{COMP_WORDS[COMP_CWORD - 2]}}
  [ "$COMP_CWORD" = 1 ] && reply='{}'
  case $command in
{}  esac
  case $command in
{}  esac
  case $before in
{}  esac
  [[ $word == -* && -z $reply ]] && reply=$options
  COMPREPLY=($(compgen -W "$reply" -- "$word"))
}}
complete -o default -F _bbb bbb
)",
      names, words, options, values);
}

std::string zsh_script() {
  std::string names, words, options;
  const std::map<std::string, std::string> known = choices();
  for (const Command& command : commands()) {
    names += fmt::format("    {}\n", quoted(cat(command.name, ":", command.summary), "", "'\\''"));
    if (has_words(command))
      words += fmt::format(
          "    {0})\n      if (( CURRENT == 3 )); then compadd {1}; return; fi\n      "
          "command=\"{0} $words[3]\"; shift words; (( CURRENT-- )) ;;\n",
          command.name, command.words);
  }
  for (const Entry& entry : entries()) {
    options += fmt::format("    '{}')\n      _arguments", entry.command);
    for (const OptionHelp& o : entry.options) {
      const auto choice = known.find(o.name);
      const std::string value = !o.takes_value ? ""
                                : choice == known.end()
                                    ? ":value:_files"
                                    : fmt::format(":value:({})", choice->second);
      const std::string help = quoted(o.text, "[]:\\", "'\\''");
      options += fmt::format(" \\\n        '*--{}{}['{}']{}'", o.name, o.takes_value ? "=" : "",
                             help, value);
    }
    options += " ;;\n";
  }
  return fmt::format(R"(#compdef bbb
# zsh completion of bbb, by `bbb completion zsh`.
_bbb() {{
  local command=$words[2]
  local -a commands=(
{}  )
  if (( CURRENT == 2 )); then _describe command commands; return; fi
  case $command in
{}  esac
  shift words; (( CURRENT-- ))
  case $command in
{}  esac
}}
if [ "$funcstack[1]" = _bbb ]; then _bbb "$@"; else compdef _bbb bbb; fi
)",
                     names, words, options);
}

std::string fish_script() {
  std::string out =
      "# fish completion of bbb, by `bbb completion fish`.\n"
      "function __bbb_in\n"
      "  set -l words (commandline -opc)\n"
      "  string match -q -- \"$argv *\" \"$words[2..-1] \"\n"
      "end\n";
  const auto quote = [](const std::string& text) { return quoted(text, "\\", "\\'"); };
  const std::map<std::string, std::string> known = choices();
  for (const Command& command : commands()) {
    out +=
        fmt::format("complete -c bbb -f -n 'test (count (commandline -opc)) -eq 1' -a {} -d {}\n",
                    command.name, quote(command.summary));
    if (has_words(command))
      out += fmt::format(
          "complete -c bbb -f -n '__bbb_in {0}; and test (count (commandline -opc)) -eq 2' -a "
          "'{1}'\n",
          command.name, command.words);
  }
  for (const Entry& entry : entries())
    for (const OptionHelp& o : entry.options) {
      out += fmt::format("complete -c bbb -n '__bbb_in {}' -l {}", entry.command, o.name);
      if (!o.letter.empty()) out += fmt::format(" -s {}", o.letter);
      const auto choice = known.find(o.name);
      if (o.takes_value)
        out += choice == known.end() ? " -r" : fmt::format(" -x -a '{}'", choice->second);
      out += fmt::format(" -d {}\n", quote(o.text));
    }
  return out;
}

}  // namespace

int completion_command(const Arguments& arguments) {
  const std::string shell = arguments.size() == 1 ? arguments[0] : "";
  if (shell == "bash")
    fmt::print("{}", bash_script());
  else if (shell == "zsh")
    fmt::print("{}", zsh_script());
  else if (shell == "fish")
    fmt::print("{}", fish_script());
  else if (shell == "--help" || shell == "-h")
    fmt::print("usage: bbb completion bash|zsh|fish      source <(bbb completion bash)\n");
  else
    throw UsageError("bbb completion takes one of bash, zsh and fish");
  return 0;
}

}  // namespace bbb::tools
