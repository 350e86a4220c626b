#!/usr/bin/env bash
# The published comparison on one GPU, end to end: sra-128e, stdmoe-128e and dense-29m on WikiText-103, then
# their tables: perplexity over real tokens and under the published protocol, epoch by epoch.
#
#   launch/reproduce_sra_128e.sh [key.path=value ...] [options of tools/compare.py]
#   DATA=wikitext-2 launch/reproduce_sra_128e.sh data.source=wikitext-2 training.steps=20
#
#   DATA         folder with wiki.*.tokens    (none: `datasets`, from its cache or the hub)
#   SEEDS        seeds of each recipe         (19, the published one)
#   OUT          cells, tables and runs       (runs/reproduce)
#   DEEPSPEED    DeepSpeed JSON               (ds_configs/zero2.json)
#
# Overrides go to all recipes. Stop it with Ctrl-C or SIGTERM: the run saves and leaves. The same command goes
# on from there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -x $root/.venv/bin/python ]] || PATH=$root/.venv/bin:$PATH

overrides=(${DATA:+"data.path=$DATA"})
options=()
for word in "$@"; do
    if [[ $word != -* && $word == *=* ]]; then overrides+=("$word"); else options+=("$word"); fi
done

cat >&2 <<'END'
published, validation, padding counted (over real tokens, estimated): sra-128e 35.9 to 16.95 in five epochs of
k = 1, then 15.37, 14.21, 13.65, 13.41 (33) with k = 2; stdmoe-128e 13.53 (33.3) and dense-29m 14.13 (35.3)
after ten epochs
END
exec python "$root/tools/compare.py" --recipes sra-128e stdmoe-128e dense-29m --seeds "${SEEDS:-19}" \
    --deepspeed "${DEEPSPEED:-$root/ds_configs/zero2.json}" --out "${OUT:-runs/reproduce}" \
    ${overrides[@]+--set "${overrides[@]}"} ${options[@]+"${options[@]}"}
