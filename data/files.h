// Files written so that a crash or a full disk leaves the old state: temporary name, sync, rename.
#pragma once

#include <cstdint>
#include <string>

namespace bbb::data {

std::string read_file(const std::string& path);  // whole file; throws, naming it
// Writes text or bytes under a temporary name in the same directory, syncs it, renames it to
// `path`, and syncs the directory. Throws, naming path and cause; then nothing is left behind.
void write_file_atomic(const std::string& path, const std::string& content);

// A name out of a file, fit for a one-line message: control and non-ASCII bytes as \xNN, cut after
// 80 bytes.
std::string printable(const std::string& name);

// A file built piece by piece under a temporary name beside `path`; commit() syncs and renames it.
// Destroyed without commit(): removed. Throws, naming path and cause, on any I/O error.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, int64_t bytes);
  void commit();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

// A directory built under a temporary name beside `path` and renamed into place by commit().
// Destroyed without commit(): the temporary directory is removed. Throws at construction where
// `path` exists and is a non-empty directory, or the parent is missing or read-only.
class AtomicDirectory {
 public:
  explicit AtomicDirectory(std::string path);
  ~AtomicDirectory();
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;
  const std::string& temporary() const { return temporary_; }
  void commit();

 private:
  std::string path_;
  std::string temporary_;
  bool committed_ = false;
};

}  // namespace bbb::data
