#!/usr/bin/env bash
# Installs what the build needs and lacks: Debian packages with apt-get (as root or with sudo), and
# sentencepiece as a static library, built from PyPI's source archive into third_party/install. For
# the tests of scripts/read_packed.py, numpy and safetensors go into third_party/python.
# A second run finds everything and prints nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "setup.sh: $*" >&2
  exit 1
}

packages=(git g++ cmake ninja-build libpcre2-dev libutf8proc-dev zlib1g-dev libopenblas-dev libfmt-dev
  libcxxopts-dev libxxhash-dev nlohmann-json3-dev catch2 python3 python3-pip ca-certificates)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok' || missing+=("$package")
done
# Tools such as pip and cmake need not come from Debian.
kept=()
for package in ${missing[@]+"${missing[@]}"}; do
  case $package in
    python3) command -v python3 >/dev/null && continue ;;
    python3-pip) python3 -m pip --version >/dev/null 2>&1 && continue ;;
    cmake) command -v cmake >/dev/null && continue ;;
    ninja-build) command -v ninja >/dev/null && continue ;;
    g++) command -v g++ >/dev/null && continue ;;
    git) command -v git >/dev/null && continue ;;
  esac
  kept+=("$package")
done
if [ "${#kept[@]}" -gt 0 ]; then
  command -v apt-get >/dev/null || fail "needs these packages, and there is no apt-get: ${kept[*]}"
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "needs root or sudo to install: ${kept[*]}"
    as_root=(sudo)
  fi
  echo "installing ${kept[*]}"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  ${as_root[@]+"${as_root[@]}"} apt-get -qq update >"$log" 2>&1 ||
    fail "apt-get update: $(tail -n 1 "$log")"
  ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
    --no-install-recommends "${kept[@]}" >"$log" 2>&1 || fail "apt-get install: $(tail -n 1 "$log")"
fi
cmake_version=$(cmake --version | awk 'NR == 1 { print $3 }')
[ "$(printf '3.25\n%s\n' "$cmake_version" | sort -V | head -n 1)" = 3.25 ] ||
  fail "needs CMake 3.25 or newer, found $cmake_version"

install=third_party/install
if [ ! -s $install/lib/libsentencepiece.a ] || [ ! -s $install/include/sentencepiece_processor.h ]; then
  echo "building sentencepiece 0.2.0"
  mkdir -p third_party
  work=$(mktemp -d third_party/.work.XXXXXX)
  trap 'rm -rf "$work" ${log:+"$log"}' EXIT
  # Debian's pip requires a virtual environment for installing, but not for downloading. To read the
  # archive's metadata, pip runs its setup.py with setuptools in an environment of its own.
  python3 -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
    --dest "$work" sentencepiece==0.2.0 >"$work/log" 2>&1 ||
    fail "cannot download sentencepiece: $(tail -n 1 "$work/log")"
  tar -C "$work" -xzf "$work"/sentencepiece-0.2.0.tar.gz || fail "cannot unpack sentencepiece"
  if ! { cmake -S "$work/sentencepiece-0.2.0/sentencepiece" -B "$work/build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DSPM_ENABLE_SHARED=OFF -DSPM_ENABLE_TCMALLOC=OFF &&
    ninja -C "$work/build" sentencepiece-static; } >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    fail "sentencepiece does not build"
  fi
  mkdir -p $install/lib $install/include
  cp "$work/sentencepiece-0.2.0/sentencepiece/src/sentencepiece_processor.h" $install/include/
  cp "$work/build/src/libsentencepiece.a" "$work/libsentencepiece.a"
  mv "$work/libsentencepiece.a" $install/lib/libsentencepiece.a
fi

python=third_party/python
if ! PYTHONPATH=$python python3 -c 'import numpy, safetensors' 2>/dev/null; then
  echo "installing numpy and safetensors for Python"
  message=$(python3 -m pip --disable-pip-version-check install --quiet --target $python numpy \
    safetensors 2>&1) || fail "cannot install numpy and safetensors: ${message##*$'\n'}"
fi
