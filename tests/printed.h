// What a command prints.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "quant/check.h"
#include "tools/cli.h"

namespace bbb::tests {

// Redirects a stream to a temporary file until restore().
class Capture {
 public:
  Capture(std::FILE* stream, int fd) : stream_(stream), fd_(fd), file_(std::tmpfile()) {
    BBB_CHECK(file_ != nullptr, "no temporary file");
    std::fflush(stream_);
    saved_ = dup(fd_);
    dup2(fileno(file_), fd_);
  }
  void restore() {
    std::fflush(stream_);
    dup2(saved_, fd_);
    close(saved_);
  }
  std::string text() const {
    std::fseek(file_, 0, SEEK_END);
    std::string text(static_cast<size_t>(std::ftell(file_)), '\0');
    std::rewind(file_);
    BBB_CHECK(std::fread(text.data(), 1, text.size(), file_) == text.size(), "cannot read back");
    return text;
  }
  ~Capture() { std::fclose(file_); }
  Capture(const Capture&) = delete;

 private:
  std::FILE* stream_;
  int fd_;
  std::FILE* file_;
  int saved_ = -1;
};

// What `work` writes to stdout and stderr. Rethrows its exception.
struct Printed {
  std::string out, err;
};
inline Printed printed_by(const std::function<void()>& work) {
  Capture out(stdout, STDOUT_FILENO), err(stderr, STDERR_FILENO);
  const auto restore = [&] {
    out.restore();
    err.restore();
  };
  try {
    work();
  } catch (...) {
    restore();
    throw;
  }
  restore();
  return {out.text(), err.text()};
}

// `bbb COMMAND ..`, as main() runs it.
struct Output : Printed {
  int code = -1;
};
inline Output bbb(tools::Arguments arguments) {
  arguments.insert(arguments.begin(), "bbb");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  int code = -1;
  const Printed printed =
      printed_by([&] { code = tools::run(static_cast<int>(argv.size()), argv.data()); });
  return {printed, code};
}

}  // namespace bbb::tests
