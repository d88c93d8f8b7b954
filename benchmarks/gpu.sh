#!/usr/bin/env bash
# Everything that is to be known of a GPU, in stages of at most ten minutes each:
#   benchmarks/gpu.sh correct|micro|profile|infer|train|deterministic
#     [--device cpu] [--out FOLDER] [--music FOLDER] [--batch 1]
# Results go to FOLDER/STAGE*.json (default gpu-results; correct writes JUnit's XML), what is printed to
# FOLDER/STAGE.log. `train`, with `--batch` items a step, and `deterministic` train on music, else on noise
# that they make. `--device cpu` goes through the same with tiny sizes, to see that all of it runs. PYTHON chooses the interpreter; the package and what
# `pip install .[test]` brings is all that is needed.
set -euo pipefail
stage=${1:?"one of correct, micro, profile, infer, train, deterministic"}
shift
device=cuda out=gpu-results music= batch=1
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2 ;;
    --out) out=$2 ;;
    --music) music=$2 ;;
    --batch) batch=$2 ;;
    *) echo "unknown option $1: expected --device, --out, --music or --batch" >&2; exit 2 ;;
  esac
  shift 2
done
case $device in cpu | cuda) ;; *) echo "--device is $device: expected cpu or cuda" >&2; exit 2 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$music" ]; then music=$(cd "$music" && pwd); fi

# minutes command...: the command, ended when its time is up.
within() {
  local minutes=$1
  shift
  timeout --signal=INT --kill-after=30 "${minutes}m" "$@"
}

small=()
if [ "$device" = cpu ]; then small=(--channels 4 --repeats 1); fi

noise() {
  "$python" - "$1" <<'PY'
import sys
from pathlib import Path

import numpy as np
import soundfile

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for number in range(4):
    audio = 0.1 * np.random.default_rng(number).standard_normal((10 * 44_100, 2))
    soundfile.write(folder / f"noise{number}.wav", audio, 44_100)
PY
}

# name options...: a training step; what does not fit into the memory is a result as well.
train_step() {
  local name=$1
  shift
  within 2 "$python" "$here/training_step.py" "$@" --data.folder "$music" --json "$out/train-$name.json" ||
    { status=$?; echo "train-$name: ended with $status, see above"
      echo "{\"exit_status\": $status}" >"$out/train-$name.json"; }
}

run() {
  case $stage in
    correct)
      marker=gpu tests=()
      if [ "$device" = cpu ]; then marker="not gpu and not slow" tests=("$here/../tests/inference/test_gpu.py"); fi
      (cd "$here/.." && within 9 "$python" -m pytest -m "$marker" --junitxml "$out/correct.xml" \
        ${tests[@]+"${tests[@]}"})
      ;;
    micro | profile)
      if [ "$device" = cpu ]; then small+=(--frames 16 --blocks 1); fi
      within 9 "$python" "$here/gpu_kernels.py" "$stage" --device "$device" ${small[@]+"${small[@]}"} \
        --json "$out/$stage.json"
      ;;
    infer)
      if [ "$device" = cpu ]; then small+=(--seconds 0.2 --batch 1 --matrix-sizes 256); else small=(--seconds 10 60 600 --batch 1 16 --most-seconds 1000); fi
      within 9 "$python" "$here/inference.py" --device "$device" --optimize "${small[@]}" --json "$out/infer.json"
      ;;
    train | deterministic)
      if [ -z "$music" ]; then music=$out/noise && noise "$music"; fi
      if [ "$device" = cpu ]; then
        settings=(--config smoke --data.segment_seconds 0.1 --steps 1 --warmup 1)
      else
        settings=(--config adversarial --config one_gpu --steps 5 --warmup 3)
      fi
      settings+=(--data.batch_size "$batch")
      if [ "$stage" = deterministic ]; then
        train_step deterministic "${settings[@]}" --trainer.deterministic true
        return
      fi
      for checkpointing in false true; do
        for switched in false true; do
          switches=()
          if [ "$switched" = true ]; then switches=(--fused-sums --sine reduced); fi
          train_step "$batch-checkpointing-$checkpointing-switched-$switched" ${switches[@]+"${switches[@]}"} \
            "${settings[@]}" --model.gradient_checkpointing "$checkpointing"
        done
      done
      ;;
    *) echo "no stage $stage: expected correct, micro, profile, infer, train or deterministic" >&2; exit 2 ;;
  esac
}

run 2>&1 | tee "$out/$stage.log"
