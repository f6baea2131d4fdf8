#include "data/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "quant/check.h"

namespace bbb::data {
namespace {

namespace fs = std::filesystem;

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

std::string cause() { return std::strerror(errno); }

std::string parent_of(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// "path.tmp-<pid>-<attempt>": no other process uses it, and the next attempt skips a crash's
// leftovers.
std::string temporary_name(const std::string& path, int attempt) {
  return cat(path, ".tmp-", ::getpid(), "-", attempt);
}

constexpr int kAttempts = 1000;

// Makes a rename inside the directory durable. Some file systems cannot sync a directory: EINVAL is
// no error.
void sync_directory(const std::string& directory) {
  const Descriptor d{::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  BBB_CHECK(d.fd >= 0, "cannot open ", directory, ": ", cause());
  BBB_CHECK(::fsync(d.fd) == 0 || errno == EINVAL, "cannot sync ", directory, ": ", cause());
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor d{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  BBB_CHECK(d.fd >= 0, "cannot open ", path, ": ", cause());
  struct stat info = {};
  BBB_CHECK(::fstat(d.fd, &info) == 0, "cannot read ", path, ": ", cause());
  BBB_CHECK(!S_ISDIR(info.st_mode), path, " is a directory, not a file");
  // Read to the end, not to st_size: a pipe has no size.
  std::string content;
  size_t used = 0;
  content.resize(static_cast<size_t>(std::max<off_t>(info.st_size, 0)) + 1);
  for (;;) {
    const ssize_t n = ::read(d.fd, content.data() + used, content.size() - used);
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n >= 0, "cannot read ", path, ": ", cause());
    if (n == 0) break;
    used += static_cast<size_t>(n);
    if (used == content.size()) content.resize(content.size() * 2);
  }
  content.resize(used);
  return content;
}

void write_file_atomic(const std::string& path, const std::string& content) {
  AtomicFile file(path);
  file.write(content.data(), static_cast<int64_t>(content.size()));
  file.commit();
}

std::string printable(const std::string& name) {
  constexpr size_t kLongest = 80;
  std::string out;
  for (size_t i = 0; i < name.size() && i < kLongest; ++i) {
    const unsigned char c = static_cast<unsigned char>(name[i]);
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, c >= 0x20 && c < 0x7f ? "%c" : "\\x%02x", c);
    out += escaped;
  }
  return name.size() > kLongest ? out + "..." : out;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  std::error_code error;
  BBB_CHECK(!fs::is_directory(path_, error), "cannot write ", path_, ": it is a directory");
  for (int attempt = 0; fd_ < 0; ++attempt) {
    temporary_ = temporary_name(path_, attempt);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    BBB_CHECK(fd_ >= 0 || (errno == EEXIST && attempt < kAttempts), "cannot write ", path_, ": ",
              cause());
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, int64_t bytes) {
  BBB_ASSERT(fd_ >= 0 && bytes >= 0);
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_, p, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)));
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n > 0, "cannot write ", path_, ": ", cause());
    p += n;
    bytes -= n;
  }
}

void AtomicFile::write_at(int64_t offset, const void* data, int64_t bytes) {
  BBB_ASSERT(fd_ >= 0 && offset >= 0 && bytes >= 0);
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n =
        ::pwrite(fd_, p, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)), offset);
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n > 0, "cannot write ", path_, ": ", cause());
    p += n;
    offset += n;
    bytes -= n;
  }
}

void AtomicFile::commit() {
  BBB_ASSERT(fd_ >= 0);
  BBB_CHECK(::fsync(fd_) == 0, "cannot write ", path_, ": ", cause());
  const int fd = fd_;
  fd_ = -1;
  BBB_CHECK(::close(fd) == 0, "cannot write ", path_, ": ", cause());
  BBB_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, "cannot write ", path_, ": ",
            cause());
  committed_ = true;
  sync_directory(parent_of(path_));
}

AtomicDirectory::AtomicDirectory(std::string path) : path_(std::move(path)) {
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  std::error_code error;
  if (fs::exists(path_, error)) {
    BBB_CHECK(fs::is_directory(path_, error), path_, " exists and is not a directory");
    BBB_CHECK(fs::is_empty(path_, error), path_, " exists and is not empty");
  }
  for (int attempt = 0;; ++attempt) {
    temporary_ = temporary_name(path_, attempt);
    if (::mkdir(temporary_.c_str(), 0777) == 0) break;
    BBB_CHECK(errno == EEXIST && attempt < kAttempts, "cannot make directory ", path_, ": ",
              cause());
  }
}

AtomicDirectory::~AtomicDirectory() {
  std::error_code ignored;  // a destructor cannot report it
  if (!committed_) fs::remove_all(temporary_, ignored);
}

void AtomicDirectory::commit() {
  BBB_ASSERT(!committed_);
  sync_directory(temporary_);
  // rename() replaces an empty directory, and fails on one that was filled meanwhile.
  BBB_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, "cannot make directory ", path_, ": ",
            cause());
  committed_ = true;
  sync_directory(parent_of(path_));
}

}  // namespace bbb::data
