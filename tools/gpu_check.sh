#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in at most 22 minutes:
#   tools/gpu_check.sh [OUT]        writes OUT/gpu_check.json (default: gpu_check/)
#
# Needs Python 3.11, torch 2.11 or later with CUDA and, unless a library of the kernels for this GPU lies in
# sra_ds/ (tools/build_kernels.py --archs 90 --out sra_ds), nvcc. Packages that are missing there come from
# $WHEELS (default: wheels/), where you have put deepspeed's and the others that
#   pip download --no-deps -d wheels/ deepspeed==0.19.8 ...
# gives. RECIPES names the recipe and its dense twin, BATCH the windows of a step, PARTS the parts to run
# (default: all). It fails where one of them fails and where none is run.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-gpu_check}
WHEELS=${WHEELS:-wheels}
RECIPES=${RECIPES:-sra-128e dense-29m}
BATCH=${BATCH:-64}
PYTHON=${PYTHON:-python3}
KNOWN="kernels router_tests router memory races barriers tests selftest backends"
PARTS=${PARTS:-$KNOWN}
for name in $PARTS; do
    [[ " $KNOWN " == *" $name "* ]] && continue
    echo "error: PARTS has $name; there are $KNOWN" >&2
    exit 2
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/*.code
if compgen -G "$WHEELS/*.whl" > /dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$OUT/site" "$WHEELS"/*.whl
    export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

part() { # name, seconds it may take, command
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [[ " $PARTS " == *" $name "* ]] || return
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" > "$OUT/$name.out" 2> "$OUT/$name.err"
    local code=$?
    echo "$code $((SECONDS - start))" > "$OUT/$name.code"
    echo "   exit $code after $((SECONDS - start)) s"
}

part kernels 120 env SRA_KERNELS=compiled "$PYTHON" -c \
    'from sra_ds.ops.extension import extension as e; print(e().reason); exit("cuda" not in e().devices)'
part router_tests 90 env SRA_TEST_DEVICE=cuda "$PYTHON" -m pytest -q tests/ops/test_cosine_route.py
part router 60 "$PYTHON" tools/bench.py router --rounds 200 --json
if command -v compute-sanitizer > /dev/null; then
    # without torch's cache of memory, so that what lies behind a tensor is nobody's
    sanitized() { # tool, tests
        env SRA_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
            --error-exitcode 9 "$PYTHON" -m pytest -q tests/ops/test_cosine_route.py -k "$2"
    }
    export -f sanitized
    export PYTHON
    part memory 180 bash -c 'sanitized memcheck "short_numbers and all"'
    part races 180 bash -c 'sanitized racecheck "short_numbers and all and 129"'
    part barriers 120 bash -c 'sanitized synccheck "short_numbers and all and 129"'
else
    echo "== no compute-sanitizer: memory, races and barriers are left out"
fi
part tests 120 "$PYTHON" -m pytest -q -m gpu tests
part selftest 150 "$PYTHON" tools/selftest.py --world 1 --kills 0 --json
# shellcheck disable=SC2086
part backends 270 "$PYTHON" tools/bench.py backends --recipes $RECIPES --batch "$BATCH" --json

"$PYTHON" - "$OUT" <<'PYTHON'
import datetime
import json
import platform
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
found = {
    "date": datetime.date.today().isoformat(),
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    "torch": torch.__version__,
    "python": platform.python_version(),
}
ran, failed = sorted(out.glob("*.code")), []
for path in ran:
    name = path.stem
    code, seconds = path.read_text().split()
    text = (out / f"{name}.out").read_text()
    try:
        result = json.loads(text)
    except ValueError:
        result = text.strip().splitlines()[-3:]
    errors = (out / f"{name}.err").read_text().strip().splitlines()[-3:] if code != "0" else []
    found[name] = {"exit": int(code), "seconds": int(seconds), "result": result, "errors": errors}
    if code != "0" and (name, code) != ("tests", "5"):  # pytest's 5: no test asks for a GPU
        failed.append(name)
(out / "gpu_check.json").write_text(json.dumps(found, indent=1))
print(out / "gpu_check.json")
if failed:
    sys.exit(f"error: failed: {' '.join(failed)}")
if not ran:
    sys.exit("error: no part was run")
PYTHON
