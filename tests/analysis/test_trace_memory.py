"""Tracing streams: memory does not grow with the text. Measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRACE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from sra_ds.analysis.traces import Pass, record
from sra_ds.config.loading import validate
from sra_ds.data.shards import ShardWriter, TokenSplit
from sra_ds.model.language_model import build_model

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))

torch.set_num_threads(1)
VOCABULARY, TOKENS, DOCUMENT = 8192, 2_000_000, 999
folder = Path(sys.argv[1])
moe = {"kind": "moe", "experts": 128, "top_k": 2, "expert": {"kind": "gelu", "hidden": 8}}
recipe = validate({
    "name": "tiny",
    "data": {"source": "docstrings", "tokenizer": {"vocab_size": VOCABULARY}},
    "model": {"width": 16, "layers": 1, "mixer": {"heads": 1}, "channel": moe},
    "training": {"steps": 1, "batch_size": 1},
})
model = build_model(recipe).eval()
rng, writer = np.random.default_rng(0), ShardWriter(folder, "valid", "uint16", 0)
shares = 1 / np.arange(2, VOCABULARY + 1)
for _ in range(TOKENS // (DOCUMENT + 1)):
    ids = 1 + rng.choice(VOCABULARY - 1, DOCUMENT, p=shares / shares.sum())
    writer.add(ids.tolist(), words=DOCUMENT, size=DOCUMENT, domain=0)
split = TokenSplit(folder, writer.close(), "uint16")
how = Pass(128, 32, 0)
record(model, split, how._replace(max_tokens=50_000), folder / "first", {})  # loads what it needs
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = resident("VmRSS")
trace = record(model, split, how, folder / "trace", {})
print(json.dumps([trace.tokens, int(trace.load_LE.sum()), resident("VmHWM") - before]))
"""
RETURN_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "1048576",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""So that the peak is what a pass needs, and not what the C library keeps."""
LIMIT = 150e6


def test_two_million_tokens_need_less_than_150_megabytes(tmp_path: Path) -> None:
    """128 experts, 8,192 token types, two choices each; what grows is the pairs that occur."""
    result = subprocess.run(
        [sys.executable, "-c", TRACE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **RETURN_FREED_MEMORY},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    tokens, routes, growth = json.loads(result.stdout)
    assert (tokens, routes) == (1_999_999, 2 * 1_999_999)
    assert growth < LIMIT
