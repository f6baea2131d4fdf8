// The order of training windows.
#include "train/sample_order.h"

#include <catch2/catch.hpp>
#include <numeric>
#include <set>

namespace bbb::tests {

using train::own_order;
using train::own_windows;
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

TEST_CASE("ranks share the slots of every batch", "[train]") {
  constexpr int64_t kSamples = 15, kBatch = 6, kSteps = 5;
  const auto order = sample_order(1, kSamples, kBatch, kSteps);
  std::vector<int32_t> ids(kSamples);
  std::iota(ids.begin(), ids.end(), 100);
  for (const int ranks : {1, 2, 3, 6}) {
    CAPTURE(ranks);
    std::vector<std::vector<int32_t>> of_ranks;
    for (int rank = 0; rank < ranks; ++rank) {
      const engine::Comm comm(rank, ranks);
      const auto own = own_windows(ids.data(), kSamples, 1, comm);
      CHECK(static_cast<int64_t>(own.size()) == comm.share(kSamples));
      const auto rows = own_order(order, comm);
      REQUIRE(static_cast<int64_t>(rows.size()) == kSteps * kBatch / ranks);
      std::vector<int32_t>& windows = of_ranks.emplace_back();
      for (const int32_t row : rows) windows.push_back(own.at(static_cast<size_t>(row)));
    }
    // Interleaved, the ranks' windows are those of one rank.
    for (size_t i = 0; i < order.size(); ++i)
      CHECK(of_ranks[i % ranks][i / ranks] == ids[static_cast<size_t>(order[i])]);
  }
}

}  // namespace bbb::tests
