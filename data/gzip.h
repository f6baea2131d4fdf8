// Gzip files as text files are packed: one member or several, in memory.
#pragma once

#include <string>

namespace bbb::data {

bool is_gzip(const std::string& content);  // by its first bytes
// What gzip content unpacks to. Throws, naming `path`, if it is cut short or damaged.
std::string gunzip(const std::string& content, const std::string& path);

}  // namespace bbb::data
