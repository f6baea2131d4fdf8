// Parses JSON from untrusted files, in the dialect that Python's json module writes: NaN, Infinity
// and -Infinity are numbers too.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace bbb::data {

// Throws Error, naming `where` and the byte, on malformed text, a duplicated key, or nesting deeper
// than 64.
nlohmann::json parse_json(const char* begin, const char* end, const std::string& where);
nlohmann::json parse_json(const std::string& text, const std::string& where);
// Keys keep their order.
nlohmann::ordered_json parse_ordered_json(const std::string& text, const std::string& where);

}  // namespace bbb::data
