#include "train/fit.h"

#include <algorithm>
#include <numeric>

#include "quant/check.h"
#include "train/run_directory.h"

namespace bbb::train {

// Of a text that is too short, one window in so many validates.
static constexpr int64_t kValidationShare = 16;

TrainConfig fit_to_data(TrainConfig c, const Typed& is_typed, int64_t max_position,
                        int64_t tokens) {
  const auto typed = [&](const char* option) { return is_typed && is_typed(option); };
  const bool blocks = trains_blocks(c);
  if (!typed("seq-len")) {
    if (max_position > 0) c.seq_len = std::min(c.seq_len, max_position);
    const int64_t asked =
        (typed("samples") ? c.samples : 1) + (typed("val-samples") ? c.val_samples : 1);
    const int64_t longest = tokens / std::max(kLeastWindows, asked);
    c.seq_len = std::clamp<int64_t>(longest, 2, std::max<int64_t>(2, c.seq_len));
  }
  const int64_t windows = tokens / std::max<int64_t>(1, c.seq_len);
  if (!typed("val-samples") && windows < c.samples + c.val_samples) {
    // Without blocks no training depends on validation: it takes what is left, if anything is.
    const bool keep_samples = typed("samples") || (!blocks && windows >= c.samples);
    const int64_t room = keep_samples ? windows - c.samples : windows / kValidationShare;
    const int64_t least = keep_samples && !blocks ? 0 : 1;
    c.val_samples = std::clamp(room, least, std::max(least, c.val_samples));
  }
  if (!typed("samples"))
    c.samples = std::clamp<int64_t>(windows - c.val_samples, 1, std::max<int64_t>(1, c.samples));
  // Evenly, by all ranks and micro-batches.
  const auto shared = [&](int64_t batch, int64_t micro = 1) {
    const int64_t unit = std::lcm(c.comm->size(), micro);
    return batch < unit ? batch : batch - batch % unit;
  };
  if (!typed("batch")) c.batch = shared(std::min(c.batch, c.samples));
  if (!typed("e2e-batch")) {
    const bool divided = c.e2e_micro_batch > 0 && c.e2e_micro_batch <= c.e2e_batch;
    c.e2e_batch =
        shared(std::min(c.e2e_batch, c.samples), divided ? c.e2e_micro_batch : int64_t{1});
  }
  return c;
}

std::string describe_fit(const TrainConfig& asked, const TrainConfig& fitted, int64_t max_position,
                         int64_t tokens) {
  std::string list;
  const auto add = [&](const char* option, int64_t before, int64_t after) {
    if (before != after)
      list += cat(list.empty() ? "" : ", ", "--", option, " ", after, " instead of ", before);
  };
  const bool text = asked.seq_len != fitted.seq_len || asked.samples != fitted.samples ||
                    asked.val_samples != fitted.val_samples;
  add("seq-len", asked.seq_len, fitted.seq_len);
  add("samples", asked.samples, fitted.samples);
  if (trains_blocks(asked)) add("val-samples", asked.val_samples, fitted.val_samples);
  if (block_stages(asked) > 0) add("batch", asked.batch, fitted.batch);
  if (asked.e2e_steps != 0) add("e2e-batch", asked.e2e_batch, fitted.e2e_batch);
  if (list.empty()) return "";
  const bool positions = fitted.seq_len == max_position && asked.seq_len > max_position;
  if (!text) return cat("to fit ", fitted.samples, " samples: ", list);
  return cat("to fit the text (", tokens, " tokens)",
             positions ? cat(" and the model (", max_position, " positions)") : "", ": ", list);
}

}  // namespace bbb::train
