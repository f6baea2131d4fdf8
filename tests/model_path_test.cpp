// What bbb says of a path that is no model.
#include <catch2/catch.hpp>
#include <filesystem>

#include "data/files.h"
#include "data/tokenizer.h"
#include "models/checkpoint.h"
#include "tests/model_files.h"
#include "tests/support.h"

namespace bbb::tests {

using Catch::Contains;
namespace fs = std::filesystem;

TEST_CASE("model path: what is no model says what it is and what to give", "[model_path]") {
  const TempDir dir;
  for (const char* name : {"run", "adapter", "one", "two", "empty", "lfs"})
    fs::create_directory(dir / name);
  write_plain(dir / "run/run.json", "{}");
  write_plain(dir / "adapter/adapter_config.json", "{}");
  write_plain(dir / "one/model-q4", "GGUF....");
  write_plain(dir / "one/notes.txt", "notes");
  write_plain(dir / "two/b.gguf", "GGUF....");
  write_plain(dir / "two/a.gguf", "GGUF....");
  const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
  write_plain(dir / "lfs.gguf", pointer);
  write_plain(dir / "lfs/config.json", pointer);
  write_plain(dir / "cut.gguf", std::string("GGUF\3\0\0\0\xff\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", 24));

  const std::pair<std::string, std::string> said[] = {
      {"owner/Model-7b.v1", "is a model on Hugging Face"},
      {dir / "absent", "no such file or directory"},
      {dir / "run", "bbb export --run " + dir / "run"},
      {dir / "adapter", "merge it into its model"},
      {dir / "one", "give that file, " + dir / "one/model-q4"},
      {dir / "two", "give one of them, as " + dir / "two/a.gguf"},
      {dir / "empty", "not a model directory"},
      {dir / "lfs.gguf", "git lfs pull"},
      {dir / "lfs", "git lfs pull"},
      {dir / "cut.gguf", "cut short"}};
  for (const auto& [path, message] : said) {
    CAPTURE(path);
    CHECK_THROWS_WITH(models::open_checkpoint(path), Contains(message));
    if (path != dir / "lfs" && path != dir / "empty")
      CHECK_THROWS_WITH(data::load_tokenizer(path), Contains(message));
  }
  // A path of the machine is none of the hub.
  CHECK_THROWS_WITH(models::open_checkpoint(dir / "one/absent"), !Contains("Hugging Face"));
}

}  // namespace bbb::tests
