#include "data/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
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

std::string cause() { return std::strerror(errno); }

std::string parent_of(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

constexpr std::string_view kTemporary = ".tmp-";

// Processes on several machines may write to one directory, so a name may be taken: the next
// attempt has another.
std::string temporary_name(const std::string& path, int attempt) {
  return cat(path, kTemporary, ::getpid(), "-", attempt);
}

constexpr int kAttempts = 1000;
constexpr int64_t kPieceBytes = int64_t{64} << 20;

// Locks a new temporary. Returns false if a cleaner has taken it for a leftover, and removes it. A
// file system without locks has no cleaners either.
bool claim(int fd) {
  struct stat info = {};
  return (::flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) && ::fstat(fd, &info) == 0 &&
         info.st_nlink > 0;
}

// Is this open file or directory the one that `path` names now? The name of a removed temporary may
// be in use again.
bool is_at(int fd, const fs::path& path) {
  struct stat opened = {}, named = {};
  return ::fstat(fd, &opened) == 0 && ::lstat(path.c_str(), &named) == 0 &&
         opened.st_dev == named.st_dev && opened.st_ino == named.st_ino;
}

// Removes the temporaries of `path` that no process holds.
void remove_leftovers(const std::string& path) {
  const std::string name = fs::path(path).filename().string();
  std::error_code ignored;
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(parent_of(path), ignored)) {
    const std::string other = entry.path().filename().string();
    if (other.starts_with(cat(name, kTemporary)) && is_temporary(other))
      leftovers.push_back(entry.path());
  }
  for (const fs::path& leftover : leftovers) {
    const Descriptor d(::open(leftover.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (d.is_open() && ::flock(d.fd(), LOCK_EX | LOCK_NB) == 0 && is_at(d.fd(), leftover))
      fs::remove_all(leftover, ignored);
  }
}

// Can a rename replace this empty directory? Not the working directory, a link to a directory, or
// one that a file system is mounted on.
void check_replaceable(const std::string& path) {
  std::error_code error;
  BBB_CHECK(!fs::equivalent(path, ".", error), path,
            " is the working directory, which cannot be replaced: name a directory inside it");
  const std::string name = fs::path(path).filename().string();
  BBB_CHECK(name != "." && name != ".." && !fs::is_symlink(path, error), path,
            " is another name of a directory, which cannot be replaced: name the directory itself");
  struct stat own = {}, above = {};
  const bool known = ::stat(path.c_str(), &own) == 0 && ::stat((path + "/..").c_str(), &above) == 0;
  BBB_CHECK(!known || own.st_dev == above.st_dev, path,
            " is a mount point, which cannot be replaced: name a directory inside it");
}

// Makes a rename inside the directory durable. Some file systems cannot sync a directory: EINVAL is
// no error.
void sync_directory(const std::string& directory) {
  const Descriptor d(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  BBB_CHECK(d.is_open(), "cannot open ", directory, ": ", cause());
  BBB_CHECK(::fsync(d.fd()) == 0 || errno == EINVAL, "cannot sync ", directory, ": ", cause());
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor d(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  BBB_CHECK(d.is_open(), "cannot open ", path, ": ", cause());
  struct stat info = {};
  BBB_CHECK(::fstat(d.fd(), &info) == 0, "cannot read ", path, ": ", cause());
  BBB_CHECK(!S_ISDIR(info.st_mode), path, " is a directory, not a file");
  // Read to the end, not to st_size: a pipe has no size.
  std::string content;
  size_t used = 0;
  content.resize(static_cast<size_t>(std::max<off_t>(info.st_size, 0)) + 1);
  for (;;) {
    const ssize_t n = ::read(d.fd(), content.data() + used, content.size() - used);
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n >= 0, "cannot read ", path, ": ", cause());
    if (n == 0) break;
    used += static_cast<size_t>(n);
    if (used == content.size()) content.resize(content.size() * 2);
  }
  content.resize(used);
  refuse_lfs_pointer(content, path);
  return content;
}

void refuse_lfs_pointer(std::string_view content, const std::string& path) {
  constexpr size_t kLongest = 1023;  // bytes of a pointer
  BBB_CHECK(
      content.size() > kLongest || !content.starts_with("version https://git-lfs.github.com/spec/"),
      path, ": is a Git LFS pointer, not the file itself; `git lfs pull` fetches the file");
}

int64_t free_disk_bytes(const std::string& path) {
  std::error_code error;
  fs::path at = fs::absolute(path);
  while (!fs::exists(at, error) && at.has_relative_path()) at = at.parent_path();
  struct statvfs info = {};
  BBB_CHECK(::statvfs(at.c_str(), &info) == 0, path, ": its disk cannot be asked: ", cause());
  if (info.f_blocks == 0) return kUnknownBytes;
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

void check_disk(const std::string& path, int64_t bytes) {
  const int64_t free = free_disk_bytes(path);
  BBB_CHECK(bytes <= free, path, ": needs ", (bytes >> 20) + 1, " MiB, but its disk has ",
            free >> 20, " MiB free");
}

bool is_temporary(const std::string& name) {
  const size_t mark = name.rfind(kTemporary);
  if (mark == name.npos || mark == 0) return false;
  const size_t first = mark + kTemporary.size(), dash = name.find('-', first);
  const auto is_number = [](const std::string& text) {
    return !text.empty() && text.find_first_not_of("0123456789") == text.npos;
  };
  return dash != name.npos && is_number(name.substr(first, dash - first)) &&
         is_number(name.substr(dash + 1));
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

std::string without_slashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

Parents::Parents(const std::string& path) : Parents() {
  std::error_code error;
  std::vector<std::string> missing;  // the innermost one first
  for (fs::path at = fs::path(path).parent_path(); !at.empty() && !fs::exists(at, error);
       at = at.parent_path())
    missing.push_back(at.string());
  for (auto directory = missing.rbegin(); directory != missing.rend(); ++directory) {
    const bool made = ::mkdir(directory->c_str(), 0777) == 0;
    // Another process may make it meanwhile.
    BBB_CHECK(made || errno == EEXIST, "cannot make directory ", *directory, ": ", cause());
    if (made) made_.push_back(*directory);
  }
}

Parents::~Parents() {
  for (auto directory = made_.rbegin(); directory != made_.rend(); ++directory)
    ::rmdir(directory->c_str());
}

bool Descriptor::close() {
  const int fd = std::exchange(fd_, -1);
  return fd < 0 || ::close(fd) == 0;
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  std::error_code error;
  BBB_CHECK(!fs::is_directory(path_, error), "cannot write ", path_, ": it is a directory");
  if (fs::exists(path_, error) && !fs::is_regular_file(path_, error)) {
    BBB_CHECK(::access(path_.c_str(), W_OK) == 0, "cannot write ", path_, ": ", cause());
    direct_ = committed_ = true;
    return;
  }
  if (fs::is_symlink(path_, error)) path_ = fs::weakly_canonical(path_).string();
  remove_leftovers(path_);
  for (int attempt = 0; !file_.is_open(); ++attempt) {
    temporary_ = temporary_name(path_, attempt);
    file_ = Descriptor(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    BBB_CHECK(file_.is_open() || (errno == EEXIST && attempt < kAttempts), "cannot write ", path_,
              ": ", cause());
    if (file_.is_open() && !claim(file_.fd())) file_.close();
  }
}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::open_directly() {
  if (!direct_ || file_.is_open()) return;
  file_ = Descriptor(::open(path_.c_str(), O_WRONLY | O_CLOEXEC));
  BBB_CHECK(file_.is_open(), "cannot write ", path_, ": ", cause());
}

void AtomicFile::write(const void* data, int64_t bytes) {
  open_directly();
  BBB_ASSERT(file_.is_open() && bytes >= 0);
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(file_.fd(), p, static_cast<size_t>(std::min(bytes, kPieceBytes)));
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n > 0, "cannot write ", path_, ": ", cause());
    p += n;
    bytes -= n;
    start_sync(n);
  }
}

void AtomicFile::write_at(int64_t offset, const void* data, int64_t bytes) {
  open_directly();
  BBB_ASSERT(file_.is_open() && offset >= 0 && bytes >= 0);
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n =
        ::pwrite(file_.fd(), p, static_cast<size_t>(std::min(bytes, kPieceBytes)), offset);
    if (n < 0 && errno == EINTR) continue;
    BBB_CHECK(n > 0, "cannot write ", path_, ": ", cause());
    p += n;
    offset += n;
    bytes -= n;
    start_sync(n);
  }
}

void AtomicFile::start_sync(int64_t written) {
  unsynced_bytes_ += written;
  if (unsynced_bytes_ < kPieceBytes || direct_) return;
  unsynced_bytes_ = 0;
  if (::sync_file_range(file_.fd(), 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE) == 0)
    return;
  const bool cannot_start = errno == ENOSYS || errno == EINVAL || errno == EOPNOTSUPP;
  BBB_CHECK(cannot_start && ::fdatasync(file_.fd()) == 0, "cannot write ", path_, ": ", cause());
}

void AtomicFile::commit() {
  if (direct_) {
    open_directly();
    BBB_CHECK(file_.close(), "cannot write ", path_, ": ", cause());
    return;
  }
  BBB_ASSERT(file_.is_open());
  BBB_CHECK(::fsync(file_.fd()) == 0, "cannot write ", path_, ": ", cause());
  const Descriptor lock(::dup(file_.fd()));  // until the temporary has its name
  BBB_CHECK(file_.close(), "cannot write ", path_, ": ", cause());
  BBB_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, "cannot write ", path_, ": ",
            cause());
  committed_ = true;
  sync_directory(parent_of(path_));
}

AtomicDirectory::AtomicDirectory(std::string path)
    : path_(without_slashes(std::move(path))), parents_(path_) {
  std::error_code error;
  if (fs::exists(path_, error)) {
    BBB_CHECK(fs::is_directory(path_, error), path_, " exists and is not a directory");
    BBB_CHECK(fs::is_empty(path_, error), path_, " exists and is not empty");
    check_replaceable(path_);
  }
  remove_leftovers(path_);
  for (int attempt = 0; !lock_.is_open(); ++attempt) {
    temporary_ = temporary_name(path_, attempt);
    const bool made = ::mkdir(temporary_.c_str(), 0777) == 0;
    BBB_CHECK(made || (errno == EEXIST && attempt < kAttempts), "cannot make directory ", path_,
              ": ", cause());
    if (!made) continue;
    lock_ = Descriptor(::open(temporary_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    BBB_CHECK(lock_.is_open() || errno == ENOENT, "cannot open directory ", path_, ": ", cause());
    if (lock_.is_open() && !claim(lock_.fd())) lock_.close();
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
  parents_.keep();
  sync_directory(parent_of(path_));
}

}  // namespace bbb::data
