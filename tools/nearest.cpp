#include "tools/nearest.h"

#include <algorithm>

#include "quant/check.h"

namespace bbb::tools {
namespace {

// Optimal string alignment: rows of the table for the letters of `a`, columns for those of `b`.
size_t edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> table(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i)
    for (size_t j = 0; j <= b.size(); ++j) {
      size_t& least = table[i][j];
      if (i == 0 || j == 0) {
        least = i + j;
        continue;
      }
      least = std::min({table[i - 1][j] + 1, table[i][j - 1] + 1,
                        table[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        least = std::min(least, table[i - 2][j - 2] + 1);
    }
  return table[a.size()][b.size()];
}

}  // namespace

std::string did_you_mean(const std::string& typed, const std::vector<std::string>& words,
                         const std::string& dashes) {
  constexpr size_t kLeastPrefix = 3;
  const auto distance = [&](const std::string& word) {
    return typed.size() >= kLeastPrefix && word.starts_with(typed) ? 0 : edits(typed, word);
  };
  const auto nearest = std::ranges::min_element(words, {}, distance);
  if (nearest == words.end() || distance(*nearest) > std::max<size_t>(1, typed.size() / 3))
    return "";
  return cat("; did you mean ", dashes, *nearest, "?");
}

}  // namespace bbb::tools
