// Writes files so that a crash or a full disk keeps the old state: temporary name, sync, rename.
#pragma once

#include <cstdint>
#include <string>

namespace bbb::data {

std::string read_file(const std::string& path);  // whole file; throws, naming it
// Writes text or bytes under a temporary name in the same directory, syncs it, renames it to
// `path`, and syncs the directory. Throws, naming path and cause, and then leaves nothing behind.
void write_file_atomic(const std::string& path, const std::string& content);

// A name that was read from a file, made fit for a one-line message: control and non-ASCII bytes
// become \xNN, and it is cut after 80 bytes.
std::string printable(const std::string& name);

// A file that is written piece by piece under a temporary name next to `path`. commit() syncs and
// renames it; without commit() the destructor removes it. Throws, naming path and cause, on any I/O
// error.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, int64_t bytes);  // behind what was written before
  void write_at(int64_t offset, const void* data, int64_t bytes);
  void commit();
  const std::string& path() const { return path_; }
  const std::string& temporary() const { return temporary_; }  // readable before commit()

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

// A directory that is filled under a temporary name next to `path`. commit() renames it into place;
// without commit() the destructor removes it. The constructor throws if `path` exists and is not an
// empty directory, or if the parent is missing or read-only.
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
