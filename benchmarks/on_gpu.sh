#!/usr/bin/env bash
# All that wants a GPU, in stages that can be called one after another, and again after a time limit.
#   benchmarks/on_gpu.sh tests|analysis|bench|study OUT [FASHION_MNIST_FOLDER]
# Never run on a GPU so far: read what it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=$1 out=$2 data=${3:-fashion-mnist}
python=${PYTHON:-python3}
mkdir -p "$out"
case $stage in
tests)
  $python -m pytest -q -m "not slow" tests 2>&1 | tee "$out/tests.log" ;;
analysis)
  # What is written whole is left alone, so that the stage goes on where a time limit cut it off.
  once() {
    table=$out/$1.md; shift
    [ -e "$table" ] || timeout 200 $python "$@" --out "$table" || { echo "failed: $*" >&2; failed=1; }
  }
  failed=0
  cuda="--device cuda --precision bf16"
  dino="--model vit_small_patch14_dinov2 --batch 32"
  once fused benchmarks/fused.py
  once fused_fp32 benchmarks/fused.py --precision fp32
  once analysis_vit_b benchmarks/analysis.py --model vit_base_patch16_224 --heads 12 $cuda --no-peers
  once analysis_dinov2_s benchmarks/analysis.py $dino --size 518 --heads 6 --images 256 $cuda \
    --no-peers
  once attention_vit_b benchmarks/attention.py --model vit_base_patch16_224 --batch 128 $cuda
  once attention_dinov2_s benchmarks/attention.py $dino $cuda
  once analysis_peers benchmarks/analysis.py --device cuda
  exit "$failed" ;;
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
  echo "no stage '$stage': tests, analysis, bench or study" >&2
  exit 2 ;;
esac
