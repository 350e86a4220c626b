#!/usr/bin/env bash
# Train an SRA recipe and its twin of equal active feed-forward parameters one after the other, on two
# GPUs (or two CPU processes), and compare them:
#
#   launch/start_2gpu_ffn_parity.sh [RECIPE ...] [key.path=value ...] [options of tools/compare.py]
#   launch/start_2gpu_ffn_parity.sh sra-128e stdmoe-128e training.steps=2000
#
#   RECIPES      recipes, if none are given   (sra-128e dense-29m: 2 experts of 1024 against 2048)
#   SEEDS        seeds of each recipe         (19)
#   OUT          cells, tables and runs       (runs/ffn-parity)
#   DEEPSPEED    DeepSpeed JSON               (ds_configs/zero2.json)
#
# Overrides go to all recipes. Stop it with Ctrl-C or SIGTERM: the run saves and leaves. The same command goes
# on from there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -x $root/.venv/bin/python ]] || PATH=$root/.venv/bin:$PATH

recipes=()
while (($#)) && [[ $1 != -* && $1 != *=* ]]; do
    recipes+=("$1")
    shift
done
((${#recipes[@]})) || read -ra recipes <<<"${RECIPES:-sra-128e dense-29m}"

overrides=()
options=()
for word in "$@"; do
    if [[ $word == --set ]]; then continue; fi
    if [[ $word != -* && $word == *=* ]]; then overrides+=("$word"); else options+=("$word"); fi
done

exec python "$root/tools/compare.py" --recipes "${recipes[@]}" --seeds "${SEEDS:-19}" --processes 2 \
    --deepspeed "${DEEPSPEED:-$root/ds_configs/zero2.json}" --out "${OUT:-runs/ffn-parity}" \
    ${overrides[@]+--set "${overrides[@]}"} ${options[@]+"${options[@]}"}
