// LinearFormat: the shapes, types and bytes of format.md.
#include "quant/format.h"

#include <catch2/catch.hpp>

namespace bbb::tests {

using quant::FileDType;
using quant::LinearFormat;
using quant::StoredTensor;
using Shape = std::vector<int64_t>;

TEST_CASE("format: the tensors of a linear", "[format]") {
  // K is not a multiple of the group: 96 stored positions, 3 groups of 32.
  const LinearFormat format{.n = 5, .k = 70, .weight = {.bits = 3, .group = 32}};
  CHECK(format.stored_k() == 96);
  const std::vector<StoredTensor> tensors = format.tensors();
  REQUIRE(tensors.size() == 4);  // no channel is split or an outlier
  const struct {
    const char* suffix;
    FileDType dtype;
    Shape shape;
  } want[] = {{".qweight", FileDType::U8, {5, 36}},
              {".scales", FileDType::F8_E4M3, {5, 3}},
              {".zeros", FileDType::U8, {5, 2}},
              {".master_scale", FileDType::F32, {1}}};
  int64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    CAPTURE(want[i].suffix);
    CHECK(static_cast<size_t>(tensors[i].part) == i);
    CHECK(std::string(tensors[i].suffix) == want[i].suffix);
    CHECK(tensors[i].dtype == want[i].dtype);
    CHECK(tensors[i].shape == want[i].shape);
    bytes += tensors[i].bytes();
  }
  CHECK(bytes == 5 * (36 + 3 + 2) + 4);
  CHECK(format.bytes() == bytes);
}

TEST_CASE("format: bits per weight are codes, scales and zero points", "[format]") {
  for (const int bits : {2, 3, 4, 8})
    for (const int group : {32, 64, 128}) {
      CAPTURE(bits, group);
      const LinearFormat format{.n = 4096, .k = 4096, .weight = {.bits = bits, .group = group}};
      CHECK(8.0 * static_cast<double>(format.bytes()) / (4096.0 * 4096.0) ==
            Approx(bits + (8.0 + bits) / group).epsilon(1e-5));
    }
}

}  // namespace bbb::tests
