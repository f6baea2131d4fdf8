// gemm.json: the algorithms of a run's matrix products, so that the run that goes on after a kill
// takes the same ones and ends with the same bytes. A run without timed products has none.
#pragma once

#include <functional>
#include <string>

#include "engine/backend.h"
#include "models/config.h"
#include "train/config.h"

namespace bbb::train {

void save_gemm_choices(const std::string& path, const engine::GemmChoices& choices);
// Throws, naming the file, where it is damaged.
engine::GemmChoices load_gemm_choices(const std::string& path);

// Takes over the choices in `path`, where there are any, and stores new ones there before they are
// used; an empty path is no file. Another library's or device's are left: `say` tells, and products
// are timed anew. memory_bytes: what timing may take of the device; as much as recorded steps keep
// is free whenever a product is timed. How often products run is the caller's to fill in.
engine::GemmTuning stored_gemm_tuning(const engine::Backend& backend, const std::string& path,
                                      int64_t memory_bytes,
                                      std::function<void(const std::string&)> say);

}  // namespace bbb::train
