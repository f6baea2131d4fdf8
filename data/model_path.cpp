#include "data/model_path.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "quant/check.h"

namespace bbb::data {
namespace {

namespace fs = std::filesystem;

// "owner/name", of a model on a hub.
bool is_hub_name(const std::string& path) {
  constexpr std::string_view kLetters =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
  const size_t slash = path.find('/');
  if (slash == path.npos || slash == 0 || slash + 1 == path.size() || path[0] == '.') return false;
  std::string both = path;
  both.erase(slash, 1);
  std::error_code error;
  return both.find_first_not_of(kLetters) == both.npos && !fs::exists(path.substr(0, slash), error);
}

bool is_gguf(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[4] = {};
  return file.read(magic, sizeof magic) && std::equal(magic, magic + 4, "GGUF");
}

// The GGUF files of a directory, in order. Of a split one the first part stands for all.
std::vector<std::string> gguf_files(const std::string& directory) {
  std::vector<std::string> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored))
    if (entry.is_regular_file(ignored) && is_gguf(entry.path()))
      files.push_back(entry.path().string());
  std::ranges::sort(files);
  return files;
}

}  // namespace

void check_model_path(const std::string& path) {
  if (path.starts_with(kSyntheticPrefix)) return;
  std::error_code error;
  BBB_CHECK(fs::exists(path, error), path, ": no such file or directory",
            is_hub_name(path) ? "; bbb fetches nothing: if this is a model on Hugging Face, "
                                "download it and give its directory"
                              : "");
  const auto holds = [&](const char* name) { return fs::exists(fs::path(path) / name, error); };
  if (!fs::is_directory(path, error) || holds("config.json")) return;
  BBB_CHECK(!holds("run.json"), path, ": a training run, not a model; `bbb export --run ", path,
            " --out DIR` makes a model of it");
  BBB_CHECK(!holds("adapter_config.json"), path,
            ": an adapter, not a model; merge it into its model first");
  const std::vector<std::string> files = gguf_files(path);
  BBB_CHECK(files.empty(), path, ": no config.json, but ",
            files.size() == 1 ? "a GGUF: give that file, " : "GGUF files: give one of them, as ",
            files.empty() ? "" : files.front());
}

}  // namespace bbb::data
