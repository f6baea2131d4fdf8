// Loading a model for the commands that run one.
#pragma once

#include <memory>
#include <string>

#include "models/llama.h"

namespace bbb::tools {

// Checks every weight of `source`, then loads them, and shows the progress.
std::unique_ptr<models::Llama> load_model(engine::Backend& backend,
                                          const models::Checkpoint& source);

// "embedding and head: 28.3 MB, 16.0000 bits per weight"
std::string table_sizes(const models::Checkpoint& source);

}  // namespace bbb::tools
