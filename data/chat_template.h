// Rewrites a chat template's Jinja in one canonical spelling, and matches whole templates with
// patterns.
#pragma once

#include <array>
#include <optional>
#include <string>

namespace bbb::data {

// Gives equivalent templates the same text. Comments, quotes, white space inside tags and
// white-space control (trim_blocks and lstrip_blocks, as Hugging Face sets them) are resolved, line
// ends become \n, and the strings that an output concatenates become plain text:
//
//   {{ 'a' + x.b }}, {{ "a" ~ x['b'] }}        a{{x.b}}
//   x.strip(), loop.index0 == 0                x|trim, loop.first
//   for m in messages                          for message in messages
//
// {% %} are written as the bytes 1 and 2, {{ }} as 3 and 4, the quotes of a string inside a tag as
// 5, so that no text looks like a tag. Throws Error, saying what, on templates that hold these
// bytes, on tags that do not end, and on escapes that Jinja does not know.
std::string canonical_template(std::string jinja);

// A canonical template in readable form: with {% %} {{ }} and '.
std::string shown_template(std::string canonical);

// The texts that the wildcards {0} .. {9} matched.
using WildcardTexts = std::array<std::string, 10>;

// Matches a whole canonical template with a pattern. The pattern is a shown template with two kinds
// of wildcard:
//
//   {0} .. {9}   any text up to the next tag or end of string, less the plain text that follows the
//                wildcard in the pattern
//   {..}         the body of a branch, with balanced if and for
//
// Sets `reached` to the number of bytes that match.
std::optional<WildcardTexts> match_template(const std::string& pattern,
                                            const std::string& canonical, size_t* reached);

}  // namespace bbb::data
