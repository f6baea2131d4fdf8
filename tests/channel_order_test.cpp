// ChannelOrder: where each input channel is stored. LinearFormat with an order: its tensors, bytes
// and bits per activation.
#include "quant/channel_order.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <memory>
#include <numeric>

#include "quant/check.h"
#include "quant/format.h"

namespace bbb::tests {
namespace {

using Catch::Matchers::Contains;
using quant::ChannelOrder;
using quant::FileDType;
using quant::LinearFormat;
using quant::SplitSide;
using Channels = std::vector<int32_t>;

Channels ascending(int32_t first, int32_t count) {
  Channels channels(static_cast<size_t>(count));
  std::iota(channels.begin(), channels.end(), first);
  return channels;
}

}  // namespace

TEST_CASE("channel order: outliers, pairs, single channels, padding", "[order]") {
  const ChannelOrder order(70, 32, ascending(4, 32), {1, 40, 69});
  CHECK(order.k() == 70);
  CHECK(order.used() == 73);
  CHECK(order.stored_k() == 96);
  CHECK(order.pairs_begin() == 32);
  CHECK(order.pairs_end() == 38);
  Channels expected = ascending(4, 32);
  for (const int32_t split : {1, 40, 69}) expected.insert(expected.end(), 2, split);
  for (int32_t c = 0; c < 70; ++c)
    if (c != 1 && c != 40 && c != 69 && (c < 4 || c >= 36)) expected.push_back(c);
  expected.resize(96, -1);
  CHECK(order.channels() == expected);
  for (int32_t c = 0; c < 70; ++c) {
    const auto first = std::find(expected.begin(), expected.end(), c) - expected.begin();
    CHECK(order.positions()[static_cast<size_t>(c)] == first);
  }
  CHECK_FALSE(order.is_identity());
  CHECK(ChannelOrder(96, 32).is_identity());
  CHECK_FALSE(ChannelOrder(70, 32).is_identity());
  CHECK(order == ChannelOrder(70, 32, ascending(4, 32), {1, 40, 69}));
  CHECK_FALSE(order == ChannelOrder(70, 32, ascending(4, 32), {1, 40, 69}, SplitSide::Activation));
  CHECK_FALSE(order == ChannelOrder(70, 32, ascending(4, 32), {1, 40, 68}));
}

TEST_CASE("channel order: groups of single channels alone are rotated", "[order]") {
  const struct {
    int64_t k;
    int group;
    int32_t outliers, split;
    int64_t begin, end, stored;
  } cases[] = {
      {576, 128, 0, 0, 0, 512, 640},       // the last half group is padded
      {576, 128, 128, 0, 128, 512, 640},   //
      {576, 128, 0, 64, 128, 640, 640},    // 64 pairs fill a group, and no padding is left
      {576, 128, 128, 65, 384, 640, 768},  // one pair more takes another group
      {96, 32, 0, 0, 0, 96, 96},           //
      {96, 32, 0, 48, 96, 128, 160},       // the group behind the pairs; 144 positions are used
      {96, 32, 32, 64, 160, 160, 160},     // all channels are outliers or split
      {33, 32, 0, 20, 64, 64, 64},         // the group behind the pairs holds padding
  };
  for (const auto& c : cases) {
    CAPTURE(c.k, c.group, c.outliers, c.split);
    const ChannelOrder order(c.k, c.group, ascending(0, c.outliers),
                             ascending(c.outliers, c.split));
    CHECK(order.rotated_begin() == c.begin);
    CHECK(order.rotated_end() == c.end);
    CHECK(order.stored_k() == c.stored);
    for (int64_t p = order.rotated_begin(); p < order.rotated_end(); ++p)
      CHECK((p >= order.pairs_end() && p < order.used()));
  }
}

TEST_CASE("channel order: what cannot be an order is refused", "[order]") {
  const auto refused = [](Channels outliers, Channels split, const char* message) {
    CHECK_THROWS_WITH(ChannelOrder(64, 32, std::move(outliers), std::move(split)),
                      Contains(message));
  };
  Channels unordered = ascending(0, 32);
  std::swap(unordered[3], unordered[4]);
  refused(unordered, {}, "outlier channels are not ascending within [0, 64): 3 after 4");
  refused({}, {5, 5}, "split channels are not ascending within [0, 64): 5 after 5");
  refused({}, {64}, "split channels are not ascending within [0, 64): 64");
  refused({}, {-1}, "split channels are not ascending within [0, 64): -1");
  refused(ascending(33, 32), {}, "64 after 63");
  refused(ascending(0, 32), {31}, "channel 31 is both an outlier and split");
  refused(ascending(0, 31), {}, "31 outlier channels are no multiple of the group 32");
}

TEST_CASE("format: a channel order adds its lists, pairs and padding", "[format][order]") {
  LinearFormat format{.n = 5, .k = 96, .weight = {.bits = 2, .group = 32}};
  format.order = std::make_shared<ChannelOrder>(96, 32, ascending(0, 32), Channels{40, 50, 60});
  format.input = {.bits = 2, .outliers = 32};
  CHECK(format.stored_k() == 128);
  CHECK(format.groups() == 4);
  CHECK_FALSE(format.exact_input());
  const struct {
    const char* suffix;
    FileDType dtype;
    std::vector<int64_t> shape;
  } want[] = {
      {".qweight", FileDType::U8, {5, 32}},     {".scales", FileDType::F8_E4M3, {5, 4}},
      {".zeros", FileDType::U8, {5, 1}},        {".master_scale", FileDType::F32, {1}},
      {".split_channels", FileDType::I32, {3}}, {".outlier_channels", FileDType::I32, {32}}};
  const auto tensors = format.tensors();
  REQUIRE(tensors.size() == std::size(want));
  for (size_t i = 0; i < tensors.size(); ++i) {
    CAPTURE(want[i].suffix);
    CHECK(std::string(tensors[i].suffix) == want[i].suffix);
    CHECK(tensors[i].dtype == want[i].dtype);
    CHECK(tensors[i].shape == want[i].shape);
  }
  CHECK(format.bytes() == 5 * (32 + 4 + 1) + 4 + 4 * 3 + 4 * 32);

  LinearFormat other = format;
  other.order = std::make_shared<ChannelOrder>(*format.order);
  CHECK(format == other);  // by value
  other.order = std::make_shared<ChannelOrder>(96, 32, ascending(0, 32), Channels{40, 50, 61});
  CHECK_FALSE(format == other);
  other = format;
  other.input.range = quant::RangeRule::Search;
  CHECK_FALSE(format == other);
  // Without an order: ascending, padded.
  const LinearFormat plain{.n = 5, .k = 70, .weight = {.bits = 2, .group = 32}};
  other = plain;
  other.order = std::make_shared<ChannelOrder>(70, 32);
  CHECK(plain == other);
  CHECK_FALSE(plain.exact_input());
}

TEST_CASE("format: nested codes are bit planes, of which a load reads the top ones",
          "[format][order]") {
  LinearFormat format{.n = 5, .k = 70, .weight = {.bits = 2, .group = 32, .nested = true}};
  CHECK(format.code_bits() == 8);
  const auto stored = format.tensors(), loaded = format.loaded_tensors();
  CHECK(stored[0].shape == std::vector<int64_t>{8, 5, 12});
  CHECK(loaded[0].shape == std::vector<int64_t>{2, 5, 12});
  CHECK(stored[1].shape == std::vector<int64_t>{5, 3});
  CHECK(stored[2].shape == std::vector<int64_t>{5, 3});  // zero points of 8 bits
  CHECK(format.bytes() == 5 * (96 + 3 + 3) + 4);
}

TEST_CASE("format: bits per activation", "[format][order]") {
  struct Case {
    int bits;
    int32_t outliers, split;
    double codes, all;
  };
  // K = 96, G = 32. With 32 outliers and 5 split channels 101 positions are used, in 4 groups.
  const Case cases[] = {
      {16, 0, 0, 16 * 96, 16 * 96},
      {16, 32, 5, 16 * 101, 16 * 101},
      {2, 0, 0, 2 * 96, 2 * 96 + 3 * (8 + 2) + 32},
      {4, 0, 5, 4 * 101, 4 * 101 + 4 * (8 + 4) + 32},
      {2, 32, 0, 2 * 64 + 8 * 32, 2 * 64 + 8 * 32 + 2 * (8 + 2) + 16 + 2 * 32},
      {2, 32, 5, 2 * 69 + 8 * 32, 2 * 69 + 8 * 32 + 3 * (8 + 2) + 16 + 2 * 32},
  };
  for (const Case& c : cases) {
    CAPTURE(c.bits, c.outliers, c.split);
    LinearFormat format{.n = 7, .k = 96, .weight = {.bits = 2, .group = 32}};
    format.input = {.bits = c.bits, .outliers = c.outliers};
    format.order =
        std::make_shared<ChannelOrder>(96, 32, ascending(8, c.outliers), ascending(50, c.split));
    CHECK(format.activation_bits().codes == c.codes);
    CHECK(format.activation_bits().all == c.all);
  }
}

}  // namespace bbb::tests
