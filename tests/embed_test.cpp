// embed copies rows exactly.
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

}  // namespace bbb::tests
