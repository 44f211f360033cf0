#!/usr/bin/env bash
# All that wants a GPU, in stages that can be called one after another, and again after a time limit.
#   benchmarks/on_gpu.sh tests|bench|study OUT [FASHION_MNIST_FOLDER]
# Never run on a GPU so far: read what it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=$1 out=$2 data=${3:-fashion-mnist}
python=${PYTHON:-python3}
mkdir -p "$out"
case $stage in
tests)
  $python -m pytest -q -m "not slow" tests 2>&1 | tee "$out/tests.log" ;;
bench)
  for size in 28 224; do
    batch=$([ "$size" = 28 ] && echo 4096 || echo 1024)
    $python benchmarks/training.py --size "$size" --batch "$batch" --images 8192 --steps 8 \
      --workers 12 --out "$out/training_$size.json" 2>&1 | tee "$out/training_$size.log"
  done
  $python benchmarks/augmentation.py --device cuda 2>&1 | tee "$out/augmentation.log" ;;
study)
  # A run that was cut off goes on where it stood; a finished one is left alone.
  for recipe in fashion_mae fashion_teacher fashion_dmae fashion_mocov3 fashion_dino fashion_supervised; do
    run=$out/runs/$recipe
    [ -e "$run/encoder.safetensors" ] && continue
    how=$([ -e "$run/recipe.toml" ] && echo --resume || true)
    extra=()
    [ "$recipe" = fashion_dmae ] && extra=(--set "distill.teacher=run:$out/runs/fashion_teacher")
    $python -m vitprobe pretrain "$recipe" --data "$data" --out "$run" $how "${extra[@]}"
  done
  $python -m vitprobe runs "$out/runs" --out "$out/curves.pdf" --force ;;
*)
  echo "no stage '$stage': tests, bench or study" >&2
  exit 2 ;;
esac
