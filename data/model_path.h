// What a path is that is given as a model, for paths that are none.
#pragma once

#include <string>

namespace bbb::data {

// Throws, saying what the path is and what to give instead, unless it is a file, a directory with
// config.json, or a synthetic model.
void check_model_path(const std::string& path);

}  // namespace bbb::data
