#include "quant/channel_order.h"

#include <algorithm>
#include <utility>

#include "quant/check.h"

namespace bbb::quant {

static void check_channels(const std::vector<int32_t>& list, int64_t k, const char* what) {
  int32_t before = -1;
  for (const int32_t channel : list) {
    BBB_CHECK(channel > before && channel < k, what, " channels are not ascending within [0, ", k,
              "): ", channel, " after ", before);
    before = channel;
  }
}

ChannelOrder::ChannelOrder(int64_t k, int group, std::vector<int32_t> outliers,
                           std::vector<int32_t> split, SplitSide side)
    : group_(group), side_(side), outliers_(std::move(outliers)), split_(std::move(split)) {
  check_channels(outliers_, k, "outlier");
  check_channels(split_, k, "split");
  BBB_CHECK(static_cast<int64_t>(outliers_.size()) % group == 0, outliers_.size(),
            " outlier channels are no multiple of the group ", group);
  positions_.assign(static_cast<size_t>(k), -1);
  const auto put = [&](int32_t channel, int copies) {
    int32_t& position = positions_[static_cast<size_t>(channel)];
    BBB_CHECK(position < 0, "channel ", channel, " is both an outlier and split");
    position = static_cast<int32_t>(channels_.size());
    channels_.insert(channels_.end(), static_cast<size_t>(copies), channel);
  };
  for (const int32_t channel : outliers_) put(channel, 1);
  for (const int32_t channel : split_) put(channel, 2);
  for (int32_t channel = 0; channel < k; ++channel)
    if (positions_[static_cast<size_t>(channel)] < 0) put(channel, 1);
  const size_t size = static_cast<size_t>(group);
  channels_.resize((channels_.size() + size - 1) / size * size, -1);
}

int64_t ChannelOrder::rotated_begin() const { return (pairs_end() + group_ - 1) / group_ * group_; }

int64_t ChannelOrder::rotated_end() const {
  return std::max(rotated_begin(), used() / group_ * group_);
}

}  // namespace bbb::quant
