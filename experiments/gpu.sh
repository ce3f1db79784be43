#!/usr/bin/env bash
# The present figures of a GPU, for the tables of docs/speed.md: bash experiments/gpu.sh [folder]
# Data and the tiny CLIP of the toy world are built first, if they are not there (2 min on a CPU).
# MORE=1 bash experiments/gpu.sh: afterwards three more seeds, and small runs of the other methods.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version --format=csv | tee "$out/gpu.txt"

# a CUDA graph trains as single kernels do; else the times below are worth nothing
python -m pytest -q tests/test_uvit_fusion.py -k graph

# the toy flagship: ms a step, seconds in all and until 80 % are right
python uvit_fusion.py --train --out "$out/flagship" --overwrite 2>&1 | tail -n 16 \
    | tee "$out/flagship.txt"

# the paper's size: ms a step, share of the peak, latents a second; compiled, then eager
python -m experiments.fusion cost --out "$out/cost" | tee "$out/cost.txt"
python -m experiments.fusion cost --no-compile --out "$out/cost_eager" | tee "$out/cost_eager.txt"

# two processes, where there are two GPUs
if [ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ]; then
    for n in 1 2; do
        torchrun --nproc_per_node "$n" uvit_fusion.py --train --batch-size 1024 --steps 200 \
            --snapshot-at 0 --samples 64 --validation-samples 0 --out "$out/processes_$n" \
            --overwrite 2>&1 | tail -n 16 | tee "$out/processes_$n.txt"
    done
fi

if [ -n "${MORE:-}" ]; then
    for seed in 1 2 3; do
        python uvit_fusion.py --train --seed "$seed" --out "$out/seed$seed" --overwrite 2>&1 \
            | tail -n 16 | tee "$out/seed$seed.txt"
    done
    for method in llm_adapter sur_adapter fine_rewards dsd; do
        python "$method.py" --train --quick --base "$out/flagship" --out "$out/$method" \
            --overwrite 2>&1 | tail -n 16 | tee "$out/$method.txt"
    done
fi
