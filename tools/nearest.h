// The word that was meant by a mistyped one.
#pragma once

#include <string>
#include <vector>

namespace bbb::tools {

// "; did you mean TEXT?", with `dashes` in front of the word, or "" if no word is near: one that
// begins with the typed text, or else the one with the fewest edits (a letter more, less or
// changed, or two neighbours swapped), at most a third of the letters.
std::string did_you_mean(const std::string& typed, const std::vector<std::string>& words,
                         const std::string& dashes = "");

}  // namespace bbb::tools
