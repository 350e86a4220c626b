"""Preparation streams: memory does not grow with the text. Measured in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # fail instead of taking the machine
from pathlib import Path
from sra_ds.config.data import TextConfig, TokenizerConfig
from sra_ds.data.prepare import prepare
corpus = prepare(
    TextConfig(
        train=(Path(sys.argv[1]),),
        directory=Path(sys.argv[1]).parent / "corpora",
        tokenizer=TokenizerConfig(vocab_size=4096),
    ),
    progress=False,
)
print(sum(split["bytes"] for split in corpus.manifest["splits"].values()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_text(path: Path, megabytes: int, paragraph_end: str) -> None:
    """Random words of a vocabulary of 50,000, in lines of 100 and paragraphs of 10 lines."""
    rng = random.Random(0)
    vocabulary = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(50_000)
    ]
    with path.open("w") as stream:
        while stream.tell() < megabytes * 10**6:
            lines = (" ".join(rng.choices(vocabulary, k=100)) for _ in range(10))
            stream.write("\n".join(lines) + paragraph_end)


def peak_memory(path: Path) -> int:
    """Bytes of resident memory at the peak of a preparation that keeps every byte of the file."""
    result = subprocess.run(
        [sys.executable, "-c", PREPARE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
    )
    size, peak = map(int, result.stdout.split())
    assert size == path.stat().st_size
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("paragraph_end", ["\n\n", "\n"], ids=["blank lines", "no blank line"])
def test_200_megabytes_need_less_than_2_gigabytes(tmp_path, paragraph_end):
    path = tmp_path / "large.txt"
    write_text(path, 200, paragraph_end)
    assert peak_memory(path) < 2e9
