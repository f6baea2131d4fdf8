#!/usr/bin/env bash
# Builds everything and runs every test: on the CPU; on the GPU if there is one (on Hopper a second
# time, with the kernels for any GPU); the parsers' fuzzer; documentation against code; errors of
# build and command line.
# Ends with "N passed, N failed, N skipped".
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/build.sh bbb bbb_tests bbb_fuzz
scripts/fetch_demo.sh

passed=0 failed=0 skipped=0
# run_tests NAME DEVICE [VARIABLE=VALUE...]: runs the test binary once and adds the counts of its
# XML report.
run_tests() {
  local name=$1 device=$2 report=build/tests_$1.xml code=0
  shift 2
  rm -f "$report"
  env BBB_DEVICE="$device" "$@" build/bbb_tests -r xml -o "$report" || code=$?
  if [ "$code" = 77 ]; then
    echo "tests on $name: skipped, the device is absent"
    skipped=$((skipped + 1))
    return
  fi
  if [ ! -s "$report" ]; then
    echo "tests on $name: no report, exit code $code"
    failed=$((failed + 1))
    return
  fi
  local counts
  counts=$(python3 - "$report" <<'PY'
import sys, xml.etree.ElementTree as xml
count = dict(passed=0, failed=0, skipped=0)
name = "a test before the first"
try:
    for event, case in xml.iterparse(sys.argv[1], ["start", "end"]):
        if case.tag != "TestCase": continue
        name = case.get("name")
        if event == "start": continue
        bad = case.find("OverallResult").get("success") != "true"
        skipped = "SKIPPED:" in "".join(case.itertext())
        result = "failed" if bad else "skipped" if skipped else "passed"
        count[result] += 1
        if result != "passed": print(f"{result.upper()}: {name}", file=sys.stderr)
        case.clear()
except xml.ParseError:  # the report ends where the tests did
    count["failed"] += 1
    print(f"FAILED: {name}, or the next one, ended the program", file=sys.stderr)
print(count["passed"], count["failed"], count["skipped"])
PY
)
  read -r p f s <<<"$counts"
  # After a crash the report may have no failed case, but the exit code is not 0.
  if [ "$code" != 0 ] && [ "$f" = 0 ]; then f=1; fi
  echo "tests on $name: $p passed, $f failed, $s skipped"
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}
run_tests cpu cpu
run_tests cuda cuda
# Hopper only: other GPUs already ran these kernels above.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)
if [ "${capability%%$'\n'*}" = 9.0 ]; then
  run_tests cuda_generic cuda BBB_GENERIC_KERNELS=1
fi

if build/bbb_fuzz 100000 1; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
if scripts/docs_test.py; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
if scripts/cmake_test.sh; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
if scripts/install_test.sh; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
if scripts/cli_test.sh; then passed=$((passed + 1)); else failed=$((failed + 1)); fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
