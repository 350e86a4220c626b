"""Tracing streams: memory does not grow with the text. Measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRACE = """
import json, resource, sys
from pathlib import Path
import numpy as np, psutil, torch
from sra_ds.analysis.traces import Pass, record
from sra_ds.config.loading import validate
from sra_ds.data.shards import ShardWriter, TokenSplit
from sra_ds.model.language_model import build_model

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
before = psutil.Process().memory_info().rss
trace = record(model, split, how, folder / "trace", {})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([trace.tokens, int(trace.load_LE.sum()), peak - before]))
"""
LIMIT = 500e6


def test_two_million_tokens_need_less_than_500_megabytes(tmp_path: Path) -> None:
    """128 experts, 8,192 token types, two choices each; what grows is the pairs that occur."""
    result = subprocess.run(
        [sys.executable, "-c", TRACE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    tokens, routes, growth = json.loads(result.stdout)
    assert (tokens, routes) == (1_999_999, 2 * 1_999_999)
    assert growth < LIMIT
