// REQUIRE for loops over millions of elements. A report stores every assertion, so this makes one
// only where it fails.
#pragma once

#include <catch2/catch.hpp>

#define REQUIRE_QUIET(condition)            \
  do {                                      \
    if (!(condition)) REQUIRE((condition)); \
  } while (0)
