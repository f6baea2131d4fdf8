// Errors. Checks throw; only main turns them into one line and an exit code.
//
// UsageError: the command line is wrong (exit code 2). Error: everything else (exit code 1).
// BBB_CHECK(condition, parts...) is for conditions that input can break: it throws Error with the
// parts streamed into one line. BBB_ASSERT(condition) is for conditions that only a bug breaks: it
// names the expression.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace bbb {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class UsageError : public Error {
 public:
  using Error::Error;
};

// Streams every part into one string: cat("layer ", 3) == "layer 3".
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

[[noreturn]] inline void fail_assert(const char* expression, const char* file, int line) {
  throw Error(cat("internal error: ", expression, " does not hold (", file, ":", line, ")"));
}

}  // namespace bbb

#define BBB_CHECK(condition, ...)                                  \
  do {                                                             \
    if (!(condition)) throw ::bbb::Error(::bbb::cat(__VA_ARGS__)); \
  } while (0)

#define BBB_ASSERT(condition)                                             \
  do {                                                                    \
    if (!(condition)) ::bbb::fail_assert(#condition, __FILE__, __LINE__); \
  } while (0)
