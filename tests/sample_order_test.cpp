// The order of training windows.
#include "train/sample_order.h"

#include <catch2/catch.hpp>
#include <set>

namespace bbb::tests {

using train::sample_order;

TEST_CASE("each row of a batch takes the windows of its own slot, each window once an epoch",
          "[train]") {
  for (const auto& [samples, batch, steps] :
       {std::tuple{12, 4, 9}, {14, 4, 7}, {5, 5, 3}, {7, 1, 20}}) {
    CAPTURE(samples, batch, steps);
    const auto order = sample_order(1, samples, batch, steps);
    REQUIRE(order.size() == static_cast<size_t>(steps * batch));
    CHECK(order == sample_order(1, samples, batch, steps));
    const int steps_per_epoch = samples / batch;
    for (int begin = 0; begin < steps; begin += steps_per_epoch) {
      std::set<int32_t> seen;
      for (int i = begin * batch; i < std::min(begin + steps_per_epoch, steps) * batch; ++i) {
        const int32_t window = order[static_cast<size_t>(i)];
        CHECK((window >= 0 && window < samples));
        CHECK(window % batch == i % batch);
        CHECK(seen.insert(window).second);
      }
    }
  }
}

TEST_CASE("an order differs by seed and by epoch, and a shorter run takes a prefix of it",
          "[train]") {
  const auto order = sample_order(3, 64, 4, 32);
  CHECK(order != sample_order(4, 64, 4, 32));
  CHECK(std::vector(order.begin(), order.begin() + 64) !=
        std::vector(order.begin() + 64, order.end()));
  CHECK(sample_order(3, 64, 4, 20) == std::vector(order.begin(), order.begin() + 80));
}

TEST_CASE("the windows that an epoch leaves out change from epoch to epoch", "[train]") {
  const auto order = sample_order(5, 7, 2, 300);  // slots of 4 and 3 windows; 3 steps an epoch
  std::set<int32_t> left_out;
  for (int epoch = 0; epoch < 100; ++epoch) {
    std::set<int32_t> all{0, 1, 2, 3, 4, 5, 6};
    for (int i = epoch * 6; i < epoch * 6 + 6; ++i) all.erase(order[static_cast<size_t>(i)]);
    CHECK(all.size() == 1);
    left_out.insert(all.begin(), all.end());
  }
  CHECK(left_out == std::set<int32_t>{0, 2, 4, 6});
}

}  // namespace bbb::tests
