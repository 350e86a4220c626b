#!/usr/bin/env bash
# Train an SRA recipe and its twin of equal active feed-forward parameters one after the other, on two
# GPUs (or two CPU processes), and compare them:
#
#   launch/start_2gpu_ffn_parity.sh [RECIPE ...] [key.path=value ...] [options of launch/train.py]
#   launch/start_2gpu_ffn_parity.sh sra-128e stdmoe-128e training.seed=1
#
#   RECIPES      recipes, if none are given   (sra-128e dense-29m: 2 experts of 1024 against 2048)
#   RUNS         folder of the runs           (runs/ffn-parity); those in it are resumed or kept
#   DEEPSPEED    DeepSpeed JSON               (ds_configs/zero2.json)
#   MASTER_PORT  port of this machine         (29500)
#
# Overrides go to all recipes. Stop it with Ctrl-C: it finishes its step and saves. Started again, it goes
# on. The comparison is in RUNS/comparison.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${RUNS:-runs/ffn-parity}
[[ ! -x $root/.venv/bin/deepspeed ]] || PATH=$root/.venv/bin:$PATH

recipes=()
while (($#)) && [[ $1 != -* && $1 != *=* ]]; do
    recipes+=("$1")
    shift
done
((${#recipes[@]})) || read -ra recipes <<<"${RECIPES:-sra-128e dense-29m}"

directories=()
for recipe in "${recipes[@]}"; do
    run=$runs/$(basename "$recipe" .yaml)
    directories+=("$run")
    if compgen -G "$run/checkpoints/*/manifest.json" >/dev/null; then
        echo "resuming $run with the recipe it began with" >&2
        start=(--resume --run "$run")
    else
        start=(--recipe "$recipe" --run "$run")
    fi
    deepspeed --num_gpus 2 --master_port "${MASTER_PORT:-29500}" "$root/launch/train.py" \
        --deepspeed "${DEEPSPEED:-$root/ds_configs/zero2.json}" "${start[@]}" "$@"
    # the summary is written last: a checkpoint newer than it, or without it, is a run that was stopped
    if [[ ! -f $run/summary.json || $run/checkpoints/latest -nt $run/summary.json ]]; then
        echo "$run is not finished; the same command goes on" >&2
        exit 1
    fi
done
exec python "$root/tools/compare.py" --runs "${directories[@]}" --out "$runs/comparison"
