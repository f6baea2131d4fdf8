// What a path is that is given as a model, for paths that are none.
#pragma once

#include <string>

namespace bbb::data {

// Throws, saying what the path is and what to give instead, if nothing is there, or a directory
// without config.json that holds a run, an adapter or GGUF files.
void check_model_path(const std::string& path);

}  // namespace bbb::data
