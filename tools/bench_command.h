// The benchmarks of `bbb bench`, and what they share.
#pragma once

#include <nlohmann/json.hpp>

#include "tools/cli.h"

namespace bbb::tools {

int bench_gemv_command(const Arguments& arguments);
int bench_gemm_command(const Arguments& arguments);
int bench_decode_command(const Arguments& arguments);
int bench_prefill_command(const Arguments& arguments);

// To --json, if it was given.
void write_json(const CommandLine& line, const nlohmann::ordered_json& json);

}  // namespace bbb::tools
