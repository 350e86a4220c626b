"""Freed memory goes back to the system when it is asked to."""

import subprocess
import sys

from sra_ds.heap import GIVE_BACK_EVERY, giving_back

HOLES = """
import torch
from sra_ds.heap import give_back_freed_memory, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
large, small = [], []
for _ in range(40):
    large.append(torch.ones(2**21))
    small.append(torch.ones(2**10))
full = resident()
del large
kept = resident()
give_back_freed_memory()
print(full, kept, resident())
"""


def test_freed_memory_is_kept_until_it_is_given_back():
    """320 MB in blocks with something small behind each, so that the heap cannot shrink."""
    result = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=120
    )
    full, kept, left = map(float, result.stdout.split())
    assert full - kept < 30
    assert full - left > 290


def test_batches_pass_through_unchanged(monkeypatch):
    calls = []
    monkeypatch.setattr("sra_ds.heap.give_back_freed_memory", lambda: calls.append(1))
    assert list(giving_back(range(2 * GIVE_BACK_EVERY + 1))) == list(range(2 * GIVE_BACK_EVERY + 1))
    assert len(calls) == 2
