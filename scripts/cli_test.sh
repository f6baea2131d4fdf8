#!/usr/bin/env bash
# Checks the command line's promises on bad input: one line on stderr, the right exit code, nothing
# left behind. Needs build/bbb and the demo model.
set -euo pipefail
cd "$(dirname "$0")/.."
bbb=$PWD/build/bbb
model=$PWD/demo/SmolLM2-135M-Instruct.Q4_1.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

# expect CODE PATTERN COMMAND...: the command exits with CODE and writes exactly one line to stderr,
# which matches PATTERN.
expect() {
  local code=$1 pattern=$2 got=0
  shift 2
  "$@" >"$work/out" 2>"$work/err" || got=$?
  grep -vE '^(ppl|export|loading|statistics|blocks) \[' "$work/err" >"$work/lines" || true
  if [ "$got" != "$code" ] || [ "$(wc -l <"$work/lines")" != 1 ] || ! grep -qiE "$pattern" "$work/lines"; then
    echo "FAILED: $* -> exit code $got, expected $code and one line like /$pattern/; stderr:"
    cat "$work/err"
    bad=1
  fi
}

echo "some text to read" >"$work/short.txt"
: >"$work/empty.txt"
(echo short && seq -s ' ' 20000) >"$work/long.txt"
echo '{"text": 3}' >"$work/bad.jsonl"
mkdir -p "$work/nokey"
echo '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}' >"$work/nokey/config.json"
head -c 100000 "$model" >"$work/cut.gguf"
head -c 50 "$model" >"$work/cut2.gguf"

expect 2 'no command' "$bbb"
expect 2 'unknown command' "$bbb" fly
expect 2 'did you mean train\?' "$bbb" trian
expect 2 'did you mean --samples\?' "$bbb" train --sampels 3
expect 2 'wings' "$bbb" ppl --wings
expect 2 'missing' "$bbb" ppl --text x
expect 2 'seq-len' "$bbb" ppl --model "$model" --text "$work/short.txt" --seq-len many
expect 2 'device' "$bbb" ppl --model "$model" --text "$work/short.txt" --device tpu
expect 2 'unexpected' "$bbb" inspect --model "$model" stray
expect 2 'stages' "$bbb" train --model "$model" --data "$work/short.txt" --out "$work/run" --stages w5x
expect 2 'smollm2-135m' "$bbb" decode --synthetic gpt-9 --device cpu
expect 2 'deterministic' "$bbb" bench train --synthetic smollm2-135m --device cpu --deterministic --gemm "$work/gemm.json"
expect 2 'prompt' "$bbb" decode --model "$model"
expect 2 'batch.*from 1 to 64' "$bbb" decode --model "$model" --prompt x --batch 65
expect 2 'top-p' "$bbb" decode --model "$model" --prompt x --top-p 1.5
expect 2 'top-p needs a --temperature' "$bbb" decode --model "$model" --prompt x --top-p 0.5
expect 2 'seed needs a --temperature' "$bbb" chat --model "$model" --seed 1
expect 2 'batch of one prompt needs a --temperature' "$bbb" decode --model "$model" --prompt x --batch 2
expect 2 'context needs --synthetic' "$bbb" decode --model "$model" --prompt x --context 9
expect 2 'model is missing' "$bbb" chat --system x
expect 1 'nowhere' "$bbb" inspect --model "$work/nowhere"
expect 1 'nowhere' "$bbb" bench train --synthetic smollm2-135m --device cpu --gemm "$work/nowhere/gemm.json"
expect 2 'head-bits needs --format bbb' "$bbb" export --model "$model" --rtn --out "$work/out" --format hf --head-bits 8
expect 2 'head-bits.*16.*8.*4' "$bbb" export --model "$model" --rtn --out "$work/out" --head-bits 5
expect 2 'kv-bits.*16.*8.*4' "$bbb" ppl --model "$model" --text "$work/short.txt" --kv-bits 5
expect 2 'either --synthetic or --model' "$bbb" bench decode
expect 2 'prefill takes numbers of tokens' "$bbb" bench decode --synthetic smollm2-135m --prefill 512,x
expect 2 'widths needs --synthetic' "$bbb" bench prefill --model "$model" --widths w2a2
expect 1 'bench gemm .* GPU' "$bbb" bench gemm --device cpu
expect 1 'bench prefill .* GPU' "$bbb" bench prefill --synthetic smollm2-135m --device cpu
expect 1 'nowhere' "$bbb" bench gemv --device cpu --json "$work/nowhere/gemv.json"
expect 1 'nowhere' "$bbb" ppl --model "$model" --text "$work/nowhere"
expect 1 'nowhere' "$bbb" ppl --model "$model" --text "$work/short.txt" --json "$work/nowhere/ppl.json"
expect 1 'byte 6 is not UTF-8' "$bbb" ppl --model "$model" --text "$model" --device cpu
expect 2 'json is the same file as --text' "$bbb" ppl --model "$model" --text "$work/short.txt" --json "$work/short.txt"
expect 2 'json is the same file as --model' "$bbb" decode --model "$model" --prompt x --json "$model"
expect 2 'add --format gguf' "$bbb" export --model "$model" --rtn --out "$work/x.gguf"
expect 2 'val-samples.*2147483647' "$bbb" train --model "$model" --data "$work/short.txt" --out "$work/run" --val-samples 9223372036854775807
expect 1 'nowhere is no directory' "$bbb" eval --model "$model" --data "$work/nowhere" --device cpu
expect 1 'key|hidden_size' "$bbb" inspect --model "$work/nokey"
expect 1 'cut.gguf' "$bbb" inspect --model "$work/cut.gguf"
expect 1 'cut2.gguf' "$bbb" inspect --model "$work/cut2.gguf"
expect 1 'empty' "$bbb" ppl --model "$model" --text "$work/empty.txt" --device cpu
expect 0 'instead of 2048, to fit the text' "$bbb" ppl --model "$model" --text "$work/short.txt" --device cpu
expect 1 'fewer than one window' "$bbb" ppl --model "$model" --text "$work/short.txt" --seq-len 64 --device cpu
expect 1 'text|line 1' "$bbb" ppl --model "$model" --text "$work/bad.jsonl" --device cpu
expect 1 'bad.jsonl:1' "$bbb" decode --model "$model" --prompts "$work/bad.jsonl" --device cpu
expect 1 'long.txt:2: the prompt has' "$bbb" decode --model "$model" --prompts "$work/long.txt" --device cpu
expect 1 'empty.txt: no prompt' "$bbb" decode --model "$model" --prompts "$work/empty.txt" --device cpu
expect 1 'fewer than one window' "$bbb" train --model "$model" --data "$work/short.txt" --seq-len 64 --out "$work/run" --device cpu
expect 2 'e2e-batch is 9' "$bbb" train --model "$model" --data "$work/short.txt" --samples 8 --e2e-batch 9 --out "$work/run" --device cpu
expect 2 'e2e-moments 8bit is for' "$bbb" train --model "$model" --data "$work/short.txt" --samples 8 --e2e-batch 4 --e2e-moments 8bit --optimizer muon --out "$work/run" --device cpu
expect 2 'micro-batch needs --e2e' "$bbb" bench train --synthetic smollm2-135m --device cpu --micro-batch 1
expect 2 '3 ranks cannot share --e2e-batch 4' "$bbb" train --model "$model" --data "$work/short.txt" --samples 8 --e2e-batch 4 --out "$work/run" --device cpu --ranks 3
expect 2 'with --device cpu give --ranks' "$bbb" train --model "$model" --data "$work/short.txt" --out "$work/run" --device cpu --gpus 2
expect 1 'run' "$bbb" export --run "$work/nowhere" --out "$work/x" --device cpu
expect 2 'data is missing' "$bbb" eval --model "$model"
expect 2 'tasks.*piqa.*boolq' "$bbb" eval --model "$model" --data "$work" --tasks piqa,boolq
expect 2 'limit' "$bbb" eval --model "$model" --data "$work" --limit few
mkdir "$work/tasks"
expect 1 'tasks: .*piqa_valid.jsonl.*winogrande.jsonl' "$bbb" eval --model "$model" --data "$work/tasks" --device cpu
printf '{"context_options": ["a", "b"], "continuation": "c", "gold": %s}\n' 0 2 >"$work/tasks/winogrande.jsonl"
expect 1 'no file for piqa.*piqa_valid.jsonl' "$bbb" eval --model "$model" --data "$work/tasks" --tasks piqa --device cpu
expect 1 'winogrande.jsonl:2: ' "$bbb" eval --model "$model" --data "$work/tasks" --device cpu
if ! nvidia-smi -L >/dev/null 2>&1; then
  expect 1 'GPU|CUDA' "$bbb" ppl --model "$model" --text "$work/short.txt" --device cuda
fi
if [ -e "$work/run/run.json" ] || [ -e "$work/x" ]; then
  echo "FAILED: a refused command left files behind"
  bad=1
fi

# A chat of two messages without a terminal: an answer a line, and /exit ends it.
printf 'Say hi.\r\n/exit\r\nSay bye.\r\n' |
  "$bbb" chat --model "$model" --max-tokens 8 --device cpu >"$work/out" 2>"$work/err"
if [ ! -s "$work/out" ] || grep -qv '^loading \[' "$work/err"; then
  echo "FAILED: chat wrote '$(cat "$work/out")', stderr: $(cat "$work/err")"
  bad=1
fi
printf 'Say hi.\n' >"$work/chat.txt"
expect 0 'context is 8192 tokens, as many as the model has positions' \
  bash -c "echo /exit | '$bbb' chat --model '$model' --context 9000 --device cpu"
expect 0 'context of 20 tokens is full' \
  bash -c "'$bbb' chat --model '$model' --context 20 --device cpu <'$work/chat.txt'"

# One process at a time trains in a directory.
seq 1 2000 >"$work/numbers.txt"
tiny=(train --model "$model" --data "$work/numbers.txt" --samples 1 --val-samples 1 --seq-len 16
  --batch 1 --epochs 1 --e2e-steps 0 --device cpu)
mkdir "$work/held"
expect 1 'held/lock: another process is training' \
  flock "$work/held/lock" "$bbb" "${tiny[@]}" --out "$work/held"

# A full disk and a read-only one, if we may mount them.
if mkdir "$work/small" && mount -t tmpfs -o size=4m none "$work/small" 2>/dev/null; then
  expect 1 'small/x: needs .* MiB, but its disk has 4 MiB free' "$bbb" export --model "$model" --rtn --bits 2 --out "$work/small/x" --device cpu
  if [ -n "$(ls -A "$work/small")" ]; then
    echo "FAILED: a full disk left $(ls -A "$work/small") behind"
    bad=1
  fi
  expect 1 'small/a/run: needs .* MiB' "$bbb" "${tiny[@]}" --out "$work/small/a/run"
  if [ -n "$(ls -A "$work/small")" ]; then
    echo "FAILED: a full disk left $(find "$work/small") behind"
    bad=1
  fi
  mount -o remount,ro "$work/small"
  expect 1 'small/y.*read-only' "$bbb" export --model "$model" --rtn --bits 2 --out "$work/small/y" --device cpu
  umount "$work/small"
else
  echo "SKIPPED: no right to mount a small disk"
fi
expect 1 'output|write' bash -c "'$bbb' inspect --model '$model' >/dev/full"

[ "$bad" = 0 ] && echo "command line: every refusal as promised"
exit "$bad"
