#!/usr/bin/env bash
# Train on one GPU, or on the CPU where there is none:
#
#   launch/start_1gpu.sh [key.path=value ...] [options of launch/train.py]
#
#   RECIPE       name or file of the recipe   (sra-128e)
#   RUN          run directory                (runs/<recipe>); one with a checkpoint is resumed
#   DEEPSPEED    DeepSpeed JSON               (ds_configs/zero2.json)
#   MASTER_PORT  port of this machine         (29500)
#
# Stop it with Ctrl-C: it finishes its step and saves. Started again, it goes on.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=${RECIPE:-sra-128e}
run=${RUN:-runs/$(basename "$recipe" .yaml)}
[[ ! -x $root/.venv/bin/deepspeed ]] || PATH=$root/.venv/bin:$PATH

if compgen -G "$run/checkpoints/*/manifest.json" >/dev/null; then
    echo "resuming $run with the recipe it began with" >&2
    start=(--resume --run "$run")
else
    start=(--recipe "$recipe" --run "$run")
fi
exec deepspeed --num_gpus 1 --master_port "${MASTER_PORT:-29500}" "$root/launch/train.py" \
    --deepspeed "${DEEPSPEED:-$root/ds_configs/zero2.json}" "${start[@]}" "$@"
