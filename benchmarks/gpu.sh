#!/usr/bin/env bash
# What a GPU has to show: bash benchmarks/gpu.sh, on a fresh machine with one GPU and without a network, in at most eight minutes.
#
#   1  correctness: benchmarks/check_gpu.py
#   2  speed: where the time of a step goes (benchmarks/profile_step.py), then bench/gpu
#   3  train/novels_{duo,udlm,mdlm,ar} at once, then likelihood/novels_* and sample/novels_*
#
# A part that fails or runs out of its time does not stop the next. After each part what there is lies packed in $OUT, where that is set:
# results.tar.gz (metrics, curves, samples, notebooks, figures, logs) and a tar for each checkpoint, in float16.
# The machine needs a python3 with torch, lightning, tokenizers, safetensors, numpy, matplotlib, seaborn, tqdm and PyYAML; what papermill and
# ipykernel add may lie in the folder $WHEELS. Another choice: PARTS="3" TIME=400 STEPS=4000 bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
TIME=${TIME:-470}              # seconds for everything
PARTS=${PARTS:-1 2 3}          # parts to run
STEPS=${STEPS:-}               # optimiser steps of each training (empty: as many as fit, by a short training before)
METHODS=${METHODS:-ar duo mdlm udlm}
RESERVE=${RESERVE:-60}         # seconds kept for likelihoods and samples
BENCH=${BENCH:-}               # further key=value of bench/gpu
TRAIN=${TRAIN:-}               # further key=value of the trainings
WHEELS=${WHEELS:-.whl}
SITE=${SITE:-/tmp/site}
LOGS=outputs/bench/gpu_logs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

left() { echo $((TIME - SECONDS)); }

# ends N NAME: the last lines of a log, of a progress bar its last state
ends() { [ -f "$LOGS/$2.log" ] && tr "\r" "\n" <"$LOGS/$2.log" | tail -n "$1" | cut -c1-300; }

# run NAME LIMIT COMMAND...: the command for at most LIMIT seconds and no longer than there are; its output in $LOGS/NAME.log
run() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  ((limit > $(left))) && limit=$(left)
  if ((limit < 5)); then echo "$name: no time left"; return 1; fi
  timeout -k 10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  echo "$name: exit status $status after $((SECONDS - start)) of at most $limit seconds"
  ((status == 0)) || ends 15 "$name"
  return $status
}

duo() { local name=$1 limit=$2; shift 2; run "$name" "$limit" python3 -c 'import sys; from duo.runs import main; sys.exit(main())' "$@"; }

# each LABEL LIMIT TARGET WORDS...: duo-run TARGET_METHOD for all methods at once
each() {
  local label=$1 limit=$2 target=$3 method
  shift 3
  for method in $METHODS; do duo "${label}_$method" "$limit" "${target}_$method" "$@" & done
  wait
}

# pack: what there is by now, into $OUT
pack() {
  local method folder
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  find outputs/bench/gpu* outputs/{train,likelihood,sample}/novels_* -type f ! -path '*/checkpoints/*' ! -path '*/.earlier/*' 2>/dev/null |
    tar czf "$OUT/.new" -T -
  mv "$OUT/.new" "$OUT/results.tar.gz"
  for method in $METHODS; do
    folder=outputs/train/novels_$method/checkpoints
    [ -f "$folder/model.safetensors" ] && tar cf "$OUT/novels_$method.tar" -C "$folder" --exclude='*.ckpt' --exclude='raw.*' .
  done
}

# saved: a training that was stopped leaves the averaged weights of its last checkpoint, in float16
saved() {
  python3 - $METHODS <<'PYTHON'
import sys
from pathlib import Path
import torch
from duo.hub import load, save
for method in sys.argv[1:]:
    folder = Path(f"outputs/train/novels_{method}/checkpoints")
    if not (folder / "model.safetensors").exists():
        try:
            save(load(folder), folder, dtype=torch.float16, metrics={})
            print(f"{method}: stopped early, the averaged weights of its last checkpoint are saved")
        except Exception as error:
            print(f"{method}: no checkpoint ({error})")
PYTHON
}

# steps SECONDS: how many steps of the slowest training fit, by the short trainings in outputs/train/novels_probe_*
steps() {
  python3 - "$1" <<'PYTHON'
import json, sys
from pathlib import Path
runs = [json.loads(p.read_text()) for p in Path("outputs/train").glob("novels_probe_*/metrics.json")]
slowest = max((run["seconds"] / run["steps"] for run in runs), default=0.04)
print(max(10, int(0.9 * float(sys.argv[1]) / slowest) // 10 * 10))
PYTHON
}

mkdir -p "$LOGS"
if [ -d "$WHEELS" ] && ! python3 -c 'import papermill, ipykernel' 2>/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}"
{ date; nvidia-smi; python3 --version; python3 -m pip list --format freeze; } >"$LOGS/machine.log" 2>&1

for part in $PARTS; do
  case $part in
    1) run check 150 python3 benchmarks/check_gpu.py; ends 40 check ;;
    2)
      run profile 60 python3 benchmarks/profile_step.py; ends 70 profile
      duo bench 180 bench/gpu $BENCH; ends 100 bench ;;
    3)
      if [ -z "$STEPS" ]; then
        for method in $METHODS; do
          duo "probe_$method" 90 "train/novels_$method" max_steps=100 warmup_steps=10 $([ "$method" != duo ] || echo curriculum_steps=50) \
            valid_every=100 valid_blocks=16 $TRAIN --output "outputs/train/novels_probe_$method" &
        done
        wait
        STEPS=$(steps $(($(left) - 110)))  # the rest: starting, likelihoods, samples
      fi
      echo "$STEPS steps each, $(left) seconds left"
      for method in $METHODS; do
        duo "train_$method" $(($(left) - RESERVE)) "train/novels_$method" $TRAIN max_steps="$STEPS" \
          valid_every=$((STEPS / 8 + 1)) checkpoint_every=$((STEPS / 8 + 1)) $([ "$method" != duo ] || echo curriculum_steps=$((STEPS / 2))) &
      done
      wait
      saved
      pack
      each likelihood 60 likelihood/novels
      pack
      each sample 60 sample/novels
      for method in $METHODS; do for what in train likelihood sample; do ends 8 "${what}_$method"; done; done
      ;;
  esac
  pack
done
echo "done after $SECONDS seconds"
