#!/usr/bin/env bash
# Installs what is missing and builds the given targets into build/ (default: bbb).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
mkdir -p build
if ! cmake -B build -G Ninja >build/configure.log 2>&1; then
  cat build/configure.log >&2
  exit 1
fi
grep '^-- bbb:' build/configure.log
ninja -C build "${@:-bbb}"
