#!/usr/bin/env bash
# How CMake chooses CUDA, tested with a fake nvcc. If nvcc is too old or its version is unknown, the
# build is CPU-only and says so; with BBB_CUDA=ON, that is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

# expect SAYS BBB_CUDA PATTERN: a new build with an nvcc that prints SAYS. Configuring fails only if
# BBB_CUDA is ON, and its output matches PATTERN.
expect() {
  local says=$1 cuda=$2 pattern=$3 code=0 wanted=0
  printf '#!/bin/sh\necho "%s"\n' "$says" >"$work/nvcc"
  chmod +x "$work/nvcc"
  rm -rf "$work/build"
  cmake -B "$work/build" -G Ninja -DBBB_CUDA="$cuda" -DNVCC="$work/nvcc" \
    -DBBB_DEPS="${BBB_DEPS:-$PWD/third_party/install}" >"$work/log" 2>&1 || code=1
  [ "$cuda" = ON ] && wanted=1
  if [ "$code" != "$wanted" ] || ! tr -s ' \n' ' ' <"$work/log" | grep -qE "$pattern"; then
    echo "FAILED: BBB_CUDA=$cuda, nvcc says '$says': exit code $code, expected $wanted and /$pattern/:"
    cat "$work/log"
    bad=1
  fi
}

old='Cuda compilation tools, release 12.4, V12.4.131'
expect "$old" AUTO 'bbb: .*/nvcc is of CUDA 12\.4, bbb needs 13\.0: a CPU-only build'
expect "$old" ON 'BBB_CUDA=ON, but .*/nvcc is of CUDA 12\.4, bbb needs 13\.0'
expect 'no such thing' AUTO 'is of CUDA \(unknown\), bbb needs 13\.0: a CPU-only build'

# CMake 3.25 itself sets this property, and CUDA 13 has no library that would make the target.
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  mkdir "$work/modules"
  printf '%s\n' 'set_property(TARGET CUDA::nvToolsExt PROPERTY DEPRECATION "old")' \
    'include(${CMAKE_ROOT}/Modules/FindCUDAToolkit.cmake)' >"$work/modules/FindCUDAToolkit.cmake"
  rm -rf "$work/build"
  cmake -B "$work/build" -G Ninja -DCMAKE_MODULE_PATH="$work/modules" -DCMAKE_CUDA_ARCHITECTURES=90a \
    -DBBB_DEPS="${BBB_DEPS:-$PWD/third_party/install}" >"$work/log" 2>&1 ||
    { echo "FAILED: CMake 3.25 with CUDA 13:"; cat "$work/log"; bad=1; }
fi

[ "$bad" = 0 ] && echo "cmake: an unsuitable nvcc is reported, CMake 3.25 takes CUDA 13"
exit "$bad"
