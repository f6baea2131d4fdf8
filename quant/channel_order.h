// ChannelOrder: which input channel each stored position of a linear holds (numerics.md section 5).
//
//   position 0     o                  o + 2 r           K + r     K'
//            | outliers | pairs a a b b .. | single channels | padding |
//
// o outliers, a multiple of the group; r split channels, each in two neighbouring positions; all
// three parts in ascending order of channel; padding up to a multiple of the group.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/spec.h"

namespace bbb::quant {

class ChannelOrder {
 public:
  // Throws, saying what is wrong, unless `outliers` and `split` are ascending, disjoint and in
  // [0, k), and the group divides the number of outliers.
  ChannelOrder(int64_t k, int group, std::vector<int32_t> outliers = {},
               std::vector<int32_t> split = {}, SplitSide side = SplitSide::Weight);

  bool operator==(const ChannelOrder&) const = default;
  int64_t k() const { return static_cast<int64_t>(positions_.size()); }
  int64_t stored_k() const { return static_cast<int64_t>(channels_.size()); }
  int64_t used() const { return k() + static_cast<int64_t>(split_.size()); }  // without padding
  const std::vector<int32_t>& outliers() const { return outliers_; }
  const std::vector<int32_t>& split() const { return split_; }
  SplitSide side() const { return side_; }
  int64_t pairs_begin() const { return static_cast<int64_t>(outliers_.size()); }
  int64_t pairs_end() const { return pairs_begin() + 2 * static_cast<int64_t>(split_.size()); }
  // The positions of the groups that hold single channels alone: those that a rotation takes.
  int64_t rotated_begin() const;
  int64_t rotated_end() const;  // at least rotated_begin()
  // The channel at each position, -1 for padding; the first position of each channel.
  const std::vector<int32_t>& channels() const { return channels_; }
  const std::vector<int32_t>& positions() const { return positions_; }
  bool is_identity() const { return outliers_.empty() && split_.empty() && stored_k() == k(); }

 private:
  int group_;
  SplitSide side_;
  std::vector<int32_t> outliers_, split_, channels_, positions_;
};

}  // namespace bbb::quant
