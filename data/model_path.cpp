#include "data/model_path.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <regex>
#include <vector>

#include "data/tokenizer.h"
#include "quant/check.h"

namespace bbb::data {
namespace {

namespace fs = std::filesystem;

// "owner/name", of a model on a hub.
bool is_hub_name(const std::string& path) {
  static const std::regex form("[A-Za-z0-9][\\w.-]*/[A-Za-z0-9][\\w.-]*");
  std::error_code error;
  return std::regex_match(path, form) && !fs::exists(fs::path(path).parent_path(), error);
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
  throw Error(cat(path, ": no config.json: not a model directory"));
}

}  // namespace bbb::data
