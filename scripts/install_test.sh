#!/usr/bin/env bash
# Installs a build into a scratch prefix: the binary runs from there and says what it is, licences
# and completion are there, and completion in bash offers what the commands' help lists.
# usage: install_test.sh [BUILD]   (default: build)
set -euo pipefail
build=$(realpath "${1:-"$(dirname "$0")/../build"}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0
fail() {
  echo "FAILED: $*"
  bad=1
}

cmake --install "$build" --prefix "$work/usr" >"$work/log" || { cat "$work/log"; exit 1; }
bbb=$work/usr/bin/bbb
"$bbb" --version >"$work/version"
grep -qE '^bbb [0-9]+\.[0-9]+\.[0-9]+ \(commit ([0-9a-f]{10}(\+changes)?|unknown), (no CUDA|CUDA [0-9.]+, architectures .+)\)$' \
  "$work/version" || fail "--version says '$(cat "$work/version")'"
share=$work/usr/share
for file in doc/bbb/LICENSE doc/bbb/NOTICE doc/bbb/CHANGELOG.md doc/bbb/README.md \
  bash-completion/completions/bbb zsh/site-functions/_bbb fish/vendor_completions.d/bbb.fish; do
  [ -s "$share/$file" ] || fail "$file is not installed"
done

# offers LINE: what bash would offer at the end of LINE, sorted, in one line.
# shellcheck source=/dev/null
source "$share/bash-completion/completions/bbb"
offers() {
  read -ra COMP_WORDS <<<"$1"
  [ "${1: -1}" = ' ' ] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  _bbb
  printf '%s\n' "${COMPREPLY[@]}" | sort | tr '\n' ' '
}
# expect LINE WORDS
expect() {
  [ "$(offers "$1")" = "$2 " ] || fail "'$1' offers '$(offers "$1")', expected '$2'"
}
expect 'bbb tra' 'train'
expect 'bbb completion ' 'bash fish zsh'
expect 'bbb bench ' 'decode gemm gemv prefill train'
expect 'bbb bench gemv --ro' '--rows'
expect 'bbb train --device ' 'auto cpu cuda'
expect 'bbb train --e2e-loss = k' 'kl'
expect 'bbb inspect --mo' '--model'
expect 'bbb ppl --text x' ''
for command in train export ppl eval inspect decode chat 'bench train' 'bench gemv' 'bench gemm' \
  'bench decode' 'bench prefill' tokenize report; do
  # shellcheck disable=SC2086
  listed=$("$bbb" $command --help | grep -oE '^ +(-., )?--[a-z0-9-]+' | grep -oE -- '--.*' | sort |
    tr '\n' ' ')
  [ "$(offers "bbb $command --")" = "$listed" ] ||
    fail "bbb $command: completion offers '$(offers "bbb $command --")', help lists '$listed'"
done
for shell in zsh fish; do
  command -v "$shell" >/dev/null || continue
  "$bbb" completion "$shell" >"$work/script"
  "$shell" -n "$work/script" || fail "the script for $shell does not parse"
done

[ "$bad" = 0 ] && echo "installation: $(cat "$work/version"), licences, completion"
exit "$bad"
