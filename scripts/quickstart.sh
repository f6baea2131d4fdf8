#!/usr/bin/env bash
# From a bare Debian machine to text from a 2-bit model: installs what is missing, builds, fetches
# the demo model and text, trains, exports, evaluates and decodes. A second run reuses what is there.
# usage: quickstart.sh [--short]   (--short: a smaller budget, for continuous tests)
set -euo pipefail
cd "$(dirname "$0")/.."
short=0
case "${1:-}" in
  "") ;;
  --short) short=1 ;;
  *) echo "usage: quickstart.sh [--short]" >&2; exit 2 ;;
esac

scripts/build.sh bbb
scripts/fetch_demo.sh
bbb=build/bbb
model=demo/SmolLM2-135M-Instruct.Q4_1.gguf

# The budget fits ten minutes on two cores, or one minute on a GPU.
if nvidia-smi -L >/dev/null 2>&1 && grep -q '^-- bbb: CUDA' build/configure.log; then
  name=gpu
  train=(--stages "" --samples 120 --val-samples 0 --seq-len 1024 --e2e-steps 160 --e2e-batch 8)
  ppl=(--seq-len 1024 --max-windows 32)
else
  name=cpu
  train=(--stages "" --samples 192 --val-samples 0 --seq-len 128 --e2e-steps 48 --e2e-batch 4)
  ppl=(--seq-len 256 --max-windows 12)
fi
if [ "$short" = 1 ]; then
  name=short
  train=(--stages "w2a16" --samples 4 --val-samples 2 --seq-len 64 --batch 2 --epochs 1 --e2e-steps 2 --e2e-batch 2)
  ppl=(--seq-len 128 --max-windows 2)
fi
out=demo/$name
mkdir -p "$out"
start=$(date +%s)

$bbb train --model $model --data demo/train.txt --out "$out/run" "${train[@]}"
[ -e "$out/w2" ] || $bbb export --run "$out/run" --out "$out/w2"
[ -e "$out/rtn" ] || $bbb export --model $model --rtn --bits 2 --out "$out/rtn"
$bbb ppl --model $model --text demo/eval.txt "${ppl[@]}" --json "$out/full.json"
$bbb ppl --model "$out/rtn" --text demo/eval.txt "${ppl[@]}" --json "$out/rtn.json"
$bbb ppl --model "$out/w2" --text demo/eval.txt "${ppl[@]}" --json "$out/w2.json"
$bbb decode --model "$out/w2" --prompt "The package manager" --max-tokens 24 --json "$out/decode.json"

python3 - "$out" "$model" $(($(date +%s) - start)) <<'PY'
import json, os, sys
out, model, seconds = sys.argv[1:]
load = lambda name: json.load(open(f"{out}/{name}.json"))
size = lambda name: sum(os.path.getsize(os.path.join(out, name, f)) for f in os.listdir(os.path.join(out, name))) / 1e6
full, rtn, w2, decode = load("full"), load("rtn"), load("w2"), load("decode")
print(f"\n{'':<26}{'bits per weight':>16}{'MB':>8}{'perplexity':>14}")
print(f"{'full precision':<26}{full['bits_per_weight']:>16.3f}{os.path.getsize(model) / 1e6:>8.1f}{full['perplexity']:>14.2f}")
print(f"{'2 bits, round to nearest':<26}{rtn['bits_per_weight']:>16.3f}{size('rtn'):>8.1f}{rtn['perplexity']:>14.1f}")
print(f"{'2 bits, trained':<26}{w2['bits_per_weight']:>16.3f}{size('w2'):>8.1f}{w2['perplexity']:>14.1f}")
print(f"\ndecode {decode['tokens_per_s']:.1f} tokens/s on {decode['device']}; the run took {seconds} s")
print(f"The package manager{decode['text']}".replace("\n", " "))
PY
