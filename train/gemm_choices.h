// gemm.json: the algorithms of a run's matrix products. A resumed run uses the same algorithms, so
// that it ends with the same bytes. A run without timed products has no such file.
#pragma once

#include <functional>
#include <string>

#include "engine/backend.h"

namespace bbb::train {

void save_gemm_choices(const std::string& path, const engine::GemmChoices& choices);
// Throws, naming the file, if it is damaged.
engine::GemmChoices load_gemm_choices(const std::string& path);

// A tuning that uses the choices in `path`, if that file exists, and stores new choices there
// before they are used. An empty path means no file. Choices of another library or device are
// reported to `say` and not used. memory_bytes: device memory that timing may use; the bytes that
// recorded steps will keep are free while products are timed. The caller sets step_runs and
// product_runs. Throws if the file is damaged.
engine::GemmTuning stored_gemm_tuning(const engine::Backend& backend, const std::string& path,
                                      int64_t memory_bytes,
                                      std::function<void(const std::string&)> say);

}  // namespace bbb::train
