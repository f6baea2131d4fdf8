// Defaults shrink to a short text and to a model of few positions. Nobody typed them, so nothing is
// refused for their sake.
#pragma once

#include <functional>
#include <string>

#include "train/config.h"

namespace bbb::train {

// Whether the user gave this option; empty: none was given.
using Typed = std::function<bool(const char* option)>;

// The least windows into which a short text is cut.
inline constexpr int64_t kLeastWindows = 8;

// Lowers --seq-len, --samples, --val-samples, --batch and --e2e-batch, unless they were typed, so
// that `tokens` of text suffice, windows have no more positions than the model, and a step takes no
// more windows than there are. `config` need not be resolved. What remains impossible was typed.
TrainConfig fit_to_data(TrainConfig config, const Typed& typed, int64_t max_position,
                        int64_t tokens);

// One line that names the options which fit_to_data() lowered; "" if there are none.
std::string describe_fit(const TrainConfig& asked, const TrainConfig& fitted, int64_t max_position,
                         int64_t tokens);

}  // namespace bbb::train
