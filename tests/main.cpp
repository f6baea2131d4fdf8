// One test binary, run once per device: BBB_DEVICE=cpu (default) or cuda. Returns 77 if the device
// is absent; CTest reports that as skipped.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdio>

#include "tests/support.h"

int main(int argc, char** argv) {
  if (bbb::tests::on_cuda() && !bbb::engine::cuda_available()) {
    std::fprintf(stderr, "BBB_DEVICE=cuda, but there is no usable GPU: all tests skipped\n");
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
