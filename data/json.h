// JSON out of files that nobody vouches for.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace bbb::data {

// Throws Error, naming `where` and the byte, on malformed text, a duplicated key, or nesting deeper
// than 64.
nlohmann::json parse_json(const char* begin, const char* end, const std::string& where);
nlohmann::json parse_json(const std::string& text, const std::string& where);

}  // namespace bbb::data
