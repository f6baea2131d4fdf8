// Atomic files and directories: either the whole new content, or the old state and nothing else.
#include "data/files.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <thread>

#include "quant/check.h"
#include "tests/model_files.h"
#include "tests/support.h"

namespace fs = std::filesystem;
using namespace bbb;
using Catch::Matchers::Contains;

namespace {

int64_t entries(const std::string& directory) {
  return std::distance(fs::directory_iterator(directory), fs::directory_iterator());
}

}  // namespace

TEST_CASE("files: written content is read back, and replaced as a whole") {
  const tests::TempDir dir;
  std::string content("a\0b\n\xff", 5);
  data::write_file_atomic(dir / "f", content);
  CHECK(data::read_file(dir / "f") == content);
  content.assign(3'000'000, 'x');
  data::write_file_atomic(dir / "f", content);
  CHECK(data::read_file(dir / "f") == content);
  data::write_file_atomic(dir / "empty", "");
  CHECK(data::read_file(dir / "empty").empty());
  CHECK(entries(dir.path()) == 2);
}

TEST_CASE("files: errors name the path and the cause, and leave nothing behind") {
  const tests::TempDir dir;
  CHECK_THROWS_WITH(data::read_file(dir / "none"), Contains("none: No such file"));
  CHECK_THROWS_WITH(data::read_file(dir.path()), Contains("is a directory"));
  CHECK_THROWS_WITH(data::write_file_atomic(dir / "no/such/f", "x"), Contains("No such file"));
  CHECK_THROWS_WITH(data::write_file_atomic(dir.path(), "x"), Contains("is a directory"));
  CHECK(entries(dir.path()) == 0);

  // /proc takes no new file. A read-only directory would not do: root may write to it.
  CHECK_THROWS_AS(data::write_file_atomic("/proc/bbb", "x"), Error);
  CHECK_THROWS_AS(data::AtomicDirectory("/proc/bbb"), Error);
}

TEST_CASE("files: an abandoned AtomicFile leaves the old content") {
  const tests::TempDir dir;
  data::write_file_atomic(dir / "f", "old");
  {
    data::AtomicFile file(dir / "f");
    file.write("new", 3);
    CHECK(entries(dir.path()) == 2);
  }
  CHECK(data::read_file(dir / "f") == "old");
  CHECK(entries(dir.path()) == 1);
}

TEST_CASE("files: a full disk loses nothing") {
  // Limit files to 64 kB: a larger write fails as on a full disk.
  const tests::TempDir dir;
  data::write_file_atomic(dir / "f", "old");
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit limit = {65536, 65536};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      data::write_file_atomic(dir / "f", std::string(1 << 20, 'x'));
    } catch (const Error& e) {
      ::_exit(std::string(e.what()).find("cannot write") == 0 ? 7 : 1);
    }
    ::_exit(1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 7));
  CHECK(data::read_file(dir / "f") == "old");
  CHECK(entries(dir.path()) == 1);
}

TEST_CASE("files: a directory appears whole or not at all") {
  const tests::TempDir dir;
  {
    data::AtomicDirectory abandoned(dir / "out");
    data::write_file_atomic(abandoned.temporary() + "/f", "x");
    CHECK_FALSE(fs::exists(dir / "out"));
  }
  CHECK(entries(dir.path()) == 0);

  fs::create_directory(dir / "out");  // an empty directory may be replaced
  data::AtomicDirectory made(dir / "out/");
  data::write_file_atomic(made.temporary() + "/f", "x");
  made.commit();
  CHECK(data::read_file(dir / "out/f") == "x");
  CHECK(entries(dir.path()) == 1);

  CHECK_THROWS_WITH(data::AtomicDirectory(dir / "out"), Contains("is not empty"));
  CHECK_THROWS_WITH(data::AtomicDirectory(dir / "out/f"), Contains("not a directory"));
  CHECK_THROWS_WITH(data::AtomicDirectory(dir / "out/f/g"), Contains("Not a directory"));
  CHECK(entries(dir.path()) == 1);
}

TEST_CASE("files: a directory that no rename can replace is refused before anything is written") {
  const tests::TempDir dir;
  const fs::path before = fs::current_path();
  fs::current_path(dir.path());
  for (const std::string& path : {std::string("."), std::string("./"), dir.path()})
    CHECK_THROWS_WITH(data::AtomicDirectory(path), Contains("is the working directory"));
  fs::current_path(before);
  CHECK(entries(dir.path()) == 0);
  fs::create_directory(dir / "out");
  fs::create_directory_symlink(dir / "out", dir / "link");
  for (const char* path : {"link", "link/", "out/."})
    CHECK_THROWS_WITH(data::AtomicDirectory(dir / path), Contains("cannot be replaced"));
  CHECK(entries(dir.path()) == 2);
  CHECK(entries(dir / "out") == 0);
}

TEST_CASE("files: missing parents are made, and go again with an abandoned directory") {
  const tests::TempDir dir;
  fs::create_directory(dir / "a");
  { const data::AtomicDirectory abandoned(dir / "a/b/c/out"); }
  CHECK(entries(dir / "a") == 0);
  {
    const data::AtomicDirectory abandoned(dir / "a/b/c/out");
    tests::write_plain(dir / "a/b/theirs", "x");
  }
  CHECK(data::read_file(dir / "a/b/theirs") == "x");  // of another process
  CHECK(entries(dir / "a/b") == 1);
  // The last of these cannot be made: the first two go again.
  CHECK_THROWS_WITH(data::Parents(dir / "n/o/" + std::string(300, 'x') + "/out"),
                    Contains("cannot make directory"));
  CHECK_FALSE(fs::exists(dir / "n"));
  data::AtomicDirectory made(dir / "a/b/c/out");
  made.commit();
  CHECK(fs::is_directory(dir / "a/b/c/out"));
}

TEST_CASE("files: the next writer removes what a killed one left, and nothing else") {
  const tests::TempDir dir;
  const auto leave = [&](const std::string& path) {
    fs::create_directory(dir / path);
    tests::write_plain(dir / path + "/weights", "x");
  };
  leave("out.tmp-123-0");
  leave("out.tmp-123-0.kept");
  leave("other.tmp-123-0");
  tests::write_plain(dir / "out.tmp-7-3", "x");
  data::AtomicDirectory running(dir / "out");  // still being written: locked
  const std::string temporary = running.temporary();
  CHECK(entries(dir.path()) == 3);
  { const data::AtomicDirectory next(dir / "out"); }
  CHECK(fs::exists(temporary));

  tests::write_plain(dir / "f.tmp-1-0", "half");
  data::write_file_atomic(dir / "f", "whole");
  CHECK(data::read_file(dir / "f") == "whole");
  CHECK_FALSE(fs::exists(dir / "f.tmp-1-0"));
  data::AtomicFile open(dir / "g");
  data::write_file_atomic(dir / "g", "first");
  open.write("second", 6);
  open.commit();
  CHECK(data::read_file(dir / "g") == "second");
  CHECK(fs::exists(dir / "other.tmp-123-0"));
}

TEST_CASE("files: only what an atomic writer left is a temporary") {
  for (const char* name : {"a.tmp-1-0", "a.b.tmp-123-45", ".tmp-1-0.tmp-2-3"})
    CHECK(data::is_temporary(name));
  for (const char* name : {"a", ".tmp-1-0", "a.tmp-1", "a.tmp--1", "a.tmp-1-", "a.tmp-1-0x",
                           "a.tmp-x-0", "a.tmp-1-0-0", "a.tmp-1-0.txt"})
    CHECK_FALSE(data::is_temporary(name));
}

TEST_CASE("files: a disk without room is an error before anything is written") {
  const tests::TempDir dir;
  const int64_t free = data::free_disk_bytes(dir / "not/there/yet");
  CHECK(free > 0);
  CHECK_NOTHROW(data::check_disk(dir.path(), 1));
  CHECK_THROWS_WITH(data::check_disk(dir / "not/there/yet", INT64_MAX),
                    Contains("not/there/yet: needs") && Contains("MiB free"));
}

TEST_CASE("files: a link keeps its place, and what is no file is written to") {
  const tests::TempDir dir;
  data::write_file_atomic(dir / "file", "old");
  fs::create_symlink("file", dir / "link");
  data::write_file_atomic(dir / "link", "new");
  CHECK(fs::is_symlink(dir / "link"));
  CHECK(data::read_file(dir / "file") == "new");
  data::write_file_atomic("/dev/null", "nothing");
  CHECK(fs::is_character_file("/dev/null"));
  REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
  std::string read;
  std::thread reader([&] { read = data::read_file(dir / "pipe"); });
  data::write_file_atomic(dir / "pipe", "through");
  reader.join();
  CHECK(read == "through");
}

TEST_CASE("files: a Git LFS pointer is no content") {
  const tests::TempDir dir;
  tests::write_plain(dir / "f", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n");
  CHECK_THROWS_WITH(data::read_file(dir / "f"), Contains("git lfs pull"));
  // A text about pointers is longer than one.
  tests::write_plain(dir / "g",
                     "version https://git-lfs.github.com/spec/v1\n" + std::string(1000, 'x'));
  CHECK(data::read_file(dir / "g").size() > 1000);
}

TEST_CASE("files: a directory filled meanwhile is not overwritten") {
  const tests::TempDir dir;
  {
    data::AtomicDirectory made(dir / "out");
    fs::create_directory(dir / "out");
    tests::write_plain(dir / "out/theirs", "x");
    CHECK_THROWS_WITH(made.commit(), Contains("cannot make directory"));
  }
  CHECK(data::read_file(dir / "out/theirs") == "x");
  CHECK(entries(dir.path()) == 1);
}

TEST_CASE("files: names become fit for messages") {
  CHECK(data::printable("a.b") == "a.b");
  CHECK(data::printable("a\n\xff") == "a\\x0a\\xff");
  CHECK(data::printable(std::string(200, 'n')) == std::string(80, 'n') + "...");
}
