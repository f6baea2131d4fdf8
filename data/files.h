// Writes files so that a crash or a full disk keeps the old state: temporary name, sync, rename.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace bbb::data {

std::string read_file(const std::string& path);  // whole file; throws, naming it
// The end of an error about bytes that a header promises and the file does not hold.
inline constexpr const char* kCutShort = ": the file is cut short, or damaged; fetch it again";
// A checkout without its large files holds a short text in the place of each. Throws if this is
// one. `content`: the whole file.
void refuse_lfs_pointer(std::string_view content, const std::string& path);

// What free_disk_bytes() returns on a file system that does not tell.
inline constexpr int64_t kUnknownBytes = INT64_MAX;
// The bytes that are free on the disk of `path` or, if it does not exist, of its nearest parent.
int64_t free_disk_bytes(const std::string& path);
// Throws, naming both sizes, unless `bytes` more fit on that disk.
void check_disk(const std::string& path, int64_t bytes);

// Writes text or bytes under a temporary name in the same directory, syncs it, renames it to
// `path`, and syncs the directory. Throws, naming path and cause, and then leaves nothing behind.
void write_file_atomic(const std::string& path, const std::string& content);

// A name that was read from a file, made fit for a one-line message: control and non-ASCII bytes
// become \xNN, and it is cut after 80 bytes.
std::string printable(const std::string& name);

// Is this the name of a file or directory that an atomic writer had not committed?
bool is_temporary(const std::string& name);

std::string without_slashes(std::string path);  // at its end

// Creates the missing parents of a path. Without keep() the destructor removes those it made again,
// as far as they are empty; so does a constructor that throws.
class Parents {
 public:
  explicit Parents(const std::string& path);
  ~Parents();
  Parents(const Parents&) = delete;
  Parents& operator=(const Parents&) = delete;
  void keep() { made_.clear(); }

 private:
  Parents() = default;  // the destructor runs even if the other constructor throws

  std::vector<std::string> made_;  // the outermost one first
};

// An open file or directory; -1: none.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  bool close();  // false, with errno set, if what was written could not be stored

 private:
  int fd_;
};

// Atomic writers lock what they write. So a temporary without a lock is the rest of a process that
// was killed; the next writer of the same path removes it.

// A file that is written piece by piece under a temporary name next to `path`. commit() syncs and
// renames it; without commit() the destructor removes it. The disk takes the data as they come, at
// most 128 MiB behind, if the file system heeds that: so no call takes long without progress.
// Throws, naming path and cause, on any I/O error. The file behind a symbolic link is replaced, not
// the link. A device or a pipe is written to directly.
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
  void start_sync(int64_t written);
  void open_directly();

  std::string path_;
  std::string temporary_;
  Descriptor file_;
  int64_t unsynced_bytes_ = 0;
  bool committed_ = false;
  bool direct_ = false;  // path_ is no regular file, and is opened by the first write()
};

// A directory that is filled under a temporary name next to `path`. commit() renames it into place;
// without commit() the destructor removes it. The constructor makes missing parents, and throws if
// `path` exists and is not an empty directory, if it is the working directory or a mount point, or
// if a parent is read-only.
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
  Parents parents_;
  std::string temporary_;
  Descriptor lock_;  // of the temporary directory
  bool committed_ = false;
};

}  // namespace bbb::data
