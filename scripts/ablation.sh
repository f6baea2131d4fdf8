#!/usr/bin/env bash
# Repeats the tables of the method in docs/performance.md: trains, exports, evaluates, one line a run.
#
#   scripts/ablation.sh TABLE [SEED]
#
# TABLE: defaults | components | targets | recipe | widths | precisions | end-to-end | methods |
#        appendix
#
# MODEL (the demo model), DATA (.jsonl or .txt), MORE (more of the same; optional), TEXTS (files for
# perplexity, with commas between them), TASKS (a directory for bbb eval; optional) and OUT (a scratch
# directory) come from the environment. For a quick look, SAMPLES caps every run's windows, OPTIONS
# are added to every bbb train, and EVALUATION to every bbb ppl.
set -euo pipefail
cd "$(dirname "$0")/.."
tables="defaults, components, targets, recipe, widths, precisions, end-to-end, methods or appendix"
table=${1:?TABLE: $tables} seed=${2:-0}
bbb=${BBB:-build/bbb}
model=${MODEL:-demo/SmolLM2-135M-Instruct.Q4_1.gguf}
data=${DATA:-demo/train.txt}
texts=${TEXTS:-demo/eval.txt}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
all=$data
if [ -n "${MORE:-}" ]; then
  all=$out/all.${data##*.}
  [ -e "$all" ] || cat "$data" "$MORE" >"$all"
fi

# windows N: --samples N, or fewer if SAMPLES says so.
windows() { echo "--samples $((${SAMPLES:-$1} < $1 ? ${SAMPLES:-$1} : $1))"; }

# failed LABEL: the row of a command that failed, with its error.
failed() { echo "| $1 | failed: $(tail -n 1 "$out/log") |"; }

# evaluate LABEL SECONDS DIRECTORY [--bits B]: perplexities, task average and bits.
evaluate() {
  local label=$1 seconds=$2 directory=$3 line="" text result bits=""
  shift 3
  for text in ${texts//,/ }; do
    result=$("$bbb" ppl --model "$directory" --text "$text" ${EVALUATION:-} "$@" 2>"$out/log") ||
      { failed "$label"; return; }
    line+=" | $(awk '{print $2}' <<<"$result")"
    bits=$(grep -o '[0-9.]* bits per' <<<"$result" | cut -d' ' -f1 | paste -sd'/')
  done
  if [ -n "${TASKS:-}" ]; then
    "$bbb" eval --model "$directory" --data "$TASKS" "$@" --json "$out/eval.json" \
      >/dev/null 2>"$out/log" || { failed "$label"; return; }
    line+=" | $(grep -o '"average": [0-9.]*' "$out/eval.json" | cut -d' ' -f2)"
  fi
  echo "| $label | $seconds s | $bits$line | $(du -sm "$directory" | cut -f1) MB |"
}

# run LABEL DATA OPTIONS...: one run with this seed, exported and evaluated.
run() {
  local label=$1 text=$2 begin=$SECONDS
  shift 2
  rm -rf "$out/run" "$out/export"
  "$bbb" train --model "$model" --data "$text" --out "$out/run" --seed "$seed" "$@" \
    ${OPTIONS:-} >"$out/log" 2>&1 || { failed "$label"; return; }
  local seconds=$((SECONDS - begin))
  "$bbb" export --run "$out/run" --out "$out/export" >"$out/log" 2>&1 ||
    { failed "$label"; return; }
  evaluate "$label" $seconds "$out/export"
}

# whole LABEL DATA OPTIONS...: the same without blocks.
whole() { run "$1" "$2" --stages "" "${@:3}"; }

case $table in
  defaults)  # the sweeps behind the defaults
    few=$(windows 1024) many=$(windows 6144)
    whole "the default" "$data" $few
    whole "rate 1e-3" "$data" $few --e2e-lr 1e-3
    whole "batch 8" "$data" $few --e2e-batch 8
    whole "cross-entropy" "$data" $few --e2e-loss ce
    whole "minimum and maximum" "$data" $few --range minmax
    whole "10 % split" "$data" $few --ocs-ratio 0.1
    for side in auto activation; do
      whole "10 % split, side $side" "$data" $few --ocs-ratio 0.1 --split-side $side
    done
    whole "10 % split in every block" "$data" $few --ocs-ratio 0.1,0.1
    run "blocks, then 6 passes" "$data" $few --stages w2a16 --e2e-stages w2a16:6
    run "blocks, then 2 passes" "$data" $few --stages w2a16
    whole "embedding trained" "$data" $few --e2e-embedding train
    whole "6,144 windows, 1 pass" "$all" $many --e2e-stages w2a16:1
    whole "6,144 windows, 1 pass, embedding trained" "$all" $many --e2e-stages w2a16:1 \
      --e2e-embedding train
    ;;
  components)  # the paper's Table 4: what each part of the method adds
    plain="$(windows 1024) --range minmax --rotate none"
    whole "end to end, cross-entropy" "$data" $plain --e2e-loss ce
    run "blocks, straight to 2 bits" "$data" $plain --stages w2a16 --epochs 6 --e2e-steps 0
    run "blocks, w8 w4 w2" "$data" $plain --schedule A --e2e-steps 0
    for metric in l2-mean l2-max act-max weight-max kurtosis; do
      run "w8 w4 w2, 10 % split by $metric" "$data" $plain --schedule A --e2e-steps 0 \
        --ocs-ratio 0.1 --ocs-metric $metric
    done
    for group in 64 128; do
      run "w8 w4 w2, 10 % split, group $group" "$data" $plain --schedule A --e2e-steps 0 \
        --ocs-ratio 0.1 --group-size $group
    done
    ;;
  targets)  # what a block reproduces, and what a stage is fed
    blocks="$(windows 1024) --e2e-steps 0"
    for target in full follow; do
      run "straight blocks, --target $target" "$data" $blocks --stages w2a16 --target $target
    done
    for stream in same higher mix; do
      run "w8 w4 w2, --input-stream $stream" "$data" $blocks --schedule A --input-stream $stream
    done
    ;;
  recipe)  # the paper's recipe and grid, at its budget; each line is a run of its own
    paper="$(windows 4096) --val-samples 128 --epochs 2 --ocs-ratio 0.1 --range minmax --rotate none"
    paper+=" --act-range minmax --act-outliers 0"
    for to in w2a16 w2a2; do
      run "schedule A to $to, blocks alone" "$all" $paper --schedule A --to $to --e2e-steps 0
      run "schedule A to $to, then two passes end to end" "$all" $paper --schedule A --to $to
    done
    ;;
  widths)  # 2-bit weights alone and with 2-bit activations: pure, outlier group, rotation, splitting
    for stages in w2a16:6 w2a16:3,w2a2:3; do
      rate=2e-3
      [ $stages = w2a16:6 ] || rate=2e-3,1e-3
      common="$(windows 1024) --e2e-stages $stages --e2e-lr $rate"
      whole "$stages" "$data" $common --rotate none --act-outliers 0
      whole "$stages, outlier group" "$data" $common --rotate none --act-outliers 32
      whole "$stages, rotated" "$data" $common --rotate group --act-outliers 0
      whole "$stages, outlier group, rotated" "$data" $common --rotate group --act-outliers 32
      whole "$stages, 10 % split" "$data" $common --rotate none --ocs-ratio 0.1 --act-outliers 0
    done
    ;;
  precisions)  # one file for 8, 4 and 2 bits against a run for each
    common="$(windows 8832) --range minmax"
    whole "any precision, 8 bits" "$all" $common --e2e-stages w8a16:1 --any-precision 8,4,2
    for bits in 4 2; do evaluate "the same file, $bits bits" - "$out/export" --bits $bits; done
    for bits in 8 4 2; do whole "w$bits alone" "$all" $common --e2e-stages w${bits}a16:1; done
    ;;
  end-to-end)  # losses, passes, blocks in front, oscillation
    common="$(windows 1024) --range search --rotate group"
    for loss in kl ce jsd; do
      whole "$loss" "$data" $common --e2e-stages w2a16:6 --e2e-loss $loss
    done
    run "blocks, 2 epochs, then 6 passes" "$data" $common --stages w2a16 --e2e-stages w2a16:6
    whole "average 0.99" "$data" $common --e2e-stages w2a16:6 --e2e-average 0.99
    whole "damping 1e-4" "$data" $common --e2e-stages w2a16:6 --e2e-damping 1e-4
    whole "freezing" "$data" $common --e2e-stages w2a16:6 --e2e-freeze flips
    ;;
  methods)  # other methods and grids
    few=$(windows 1024)
    for range in minmax search; do
      run "GPTQ, $range" "$data" $few --method gptq --range $range --rotate none --e2e-steps 0
    done
    scales="--e2e-stages w2a16:1 --e2e-loss ce"
    run "GPTQ, search, then scales" "$data" $few --method gptq --rotate none $scales
    block_ap="$few --method block-ap --range minmax --rotate none --batch 2 --lr 2e-4 --grid-lr 1e-4"
    run "Block-AP" "$data" $block_ap --e2e-steps 0
    run "Block-AP, then scales" "$data" $block_ap $scales
    for map in scalar orthonormal learned; do
      whole "LC, $map" "$data" $few --quantizer lc --lc-map $map
    done
    whole "LC, windows that come once" "$all" $(windows 6144) --quantizer lc --e2e-stages w2a16:1
    for bits in 2.57 2.61; do
      whole "allocated, $bits bits" "$data" $few --target-bits $bits
    done
    for ste in all trust; do whole "--ste $ste" "$data" $few --ste $ste; done
    for part in scales scales-zeros ratios; do
      whole "learned $part" "$data" $few --grid-train $part
    done
    ;;
  appendix)  # what else the paper tries: schedules, Algorithm 2, LoRA, SEQ, Muon, 4-bit down-projections
    few=$(windows 1024) blocks="--e2e-steps 0"
    for schedule in A C; do
      run "schedule $schedule to w2a16" "$data" $few $blocks --schedule $schedule --to w2a16
    done
    for schedule in A B C; do
      run "schedule $schedule to w2a2" "$data" $few $blocks --schedule $schedule --to w2a2
    done
    run "w8 w4 w2 by blocks that a stage draws" "$data" $few $blocks --schedule A \
      --block-schedule stochastic
    for lr in 1e-3 5e-3; do
      run "w8 w4 w2, adapters of rank 8, $lr" "$data" $few $blocks --schedule A --lora-rank 8 --lr $lr
    done
    whole "SEQ" "$data" $few --quantizer seq
    whole "Muon" "$data" $few --optimizer muon --e2e-lr 2e-3
    w2a2="--e2e-stages w2a16:3,w2a2:3 --act-outliers 32"
    whole "w2a2" "$data" $few $w2a2
    whole "w2a2, 4 bits for down-projections of high kurtosis" "$data" $few $w2a2 --down-kurtosis 20
    ;;
  *)
    echo "unknown table: $table" >&2
    exit 2
    ;;
esac
