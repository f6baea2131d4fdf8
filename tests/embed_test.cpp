// embed copies rows exactly; its backward adds the rows of each id in their order.
#include <catch2/catch.hpp>

#include "tests/op_test.h"

namespace bbb::tests {

TEST_CASE("embed gathers rows of the table", "[embed]") {
  Backend& b = backend();
  for (const int64_t d : {1, 31, 64, 577, 576})
    for (const auto& [m, dtype] : std::vector<std::pair<int64_t, DType>>{
             {1, b.act()}, {7, b.act()}, {33, b.act()}, {300, b.act()}, {33, DType::BF16}}) {
      CAPTURE(d, m, dtype == DType::BF16);
      const int64_t v = 41;
      engine::Rng rng(19);
      const Tensor table = make(b, {v, d}, dtype, activations(rng, v * d));
      std::vector<int32_t> ids(static_cast<size_t>(m));
      for (int32_t& id : ids) id = static_cast<int32_t>(rng.below(v));
      ids.front() = 0;
      ids.back() = static_cast<int32_t>(v - 1);
      const Guarded out(b, {m, d}, b.act());
      b.embed(out.tensor(), make_ids(b, {m}, ids), table);
      CHECK(out.untouched());
      const auto rows = values_of(b, table);
      std::vector<double> want;
      for (const int32_t id : ids)
        want.insert(want.end(), rows.begin() + id * d, rows.begin() + (id + 1) * d);
      CHECK(values_of(b, out.tensor()) == want);
    }
}

TEST_CASE("embed_backward adds the rows of an id in their order", "[embed]") {
  Backend& b = backend();
  for (const int64_t d : {1, 31, 64, 577, 576})
    for (const int64_t m : {1, 7, 33, 2000})
      for (const int64_t v : {1, 2, 41, 49152}) {
        if (v > 41 && d > 64) continue;
        CAPTURE(d, m, v);
        engine::Rng rng(23);
        const std::vector<double> dx = activations(rng, m * d);
        // Every third position has id 0: longer runs of one id than a warp has lanes.
        std::vector<int32_t> ids(static_cast<size_t>(m));
        for (size_t i = 0; i < ids.size(); ++i)
          ids[i] = i % 3 == 0 ? 0 : static_cast<int32_t>(rng.below(v));
        ids.back() = static_cast<int32_t>(v - 1);
        const Tensor rows = make(b, {m, d}, b.act(), dx), positions = make_ids(b, {m}, ids);
        std::vector<float> want(static_cast<size_t>(v * d), 0.0f);
        const auto add_rows = [&] {
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < d; ++j)
              want[ids[i] * d + j] += static_cast<float>(dx[i * d + j]);
        };
        const Guarded dtable(b, {v, d}, b.real());  // poisoned: rows of no id must become 0
        for (const engine::Write mode : {engine::Write::Overwrite, engine::Write::Add}) {
          add_rows();
          if (mode == engine::Write::Overwrite)
            b.embed_backward(dtable.tensor(), rows, positions, mode);
          else
            b.record([&] { b.embed_backward(dtable.tensor(), rows, positions, mode); })->run();
          const std::vector<double> got = values_of(b, dtable.tensor());
          CHECK(std::equal(got.begin(), got.end(), want.begin(), want.end()));
          CHECK(dtable.untouched());
        }
      }
}

}  // namespace bbb::tests
