#!/usr/bin/env bash
# What is still to be measured on a CUDA device: the tests that need one, the studies of memory and of budgets there, the
# speed of a training step, and 30 epochs of the paper's network by the three gradient modes. Needs CIFAR-10 under
# ANODE_DATA, or the network to fetch it.
#
#   bash scripts/on_a_gpu.sh [FOLDER]      results go to FOLDER (outputs/gpu)
set -euo pipefail
out=${1:-outputs/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
"$python" -m pytest tests/test_cuda.py | tee "$out/cuda-tests.txt"
"$python" -m anode_exp study memory study.batch_size=256 | tee "$out/study-memory.txt"
"$python" -m anode_exp study budget study.batch_size=256 | tee "$out/study-budget.txt"
for settings in "model=squeezenext solver=rk2" "model=squeezenext solver=rk2 runtime.precision=bf16" \
  "model=squeezenext solver=rk2 runtime.precision=bf16 runtime.compile=true" \
  "model=resnet18 solver=euler runtime.precision=bf16"; do
  # shellcheck disable=SC2086
  "$python" -m anode_exp bench dataset=cifar10 recipe.batch_size=256 $settings
done | tee "$out/bench.txt"
"$python" -m anode_exp train -m model=squeezenext solver=rk2 recipe.epochs=30 \
  gradient=full_backprop,dto_checkpoint,reverse_adjoint "hydra.sweep.dir=$out/squeezenext-rk2"
