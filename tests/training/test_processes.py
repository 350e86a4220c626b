"""What several processes leave behind: nothing."""

import os
from pathlib import Path

from distributed import run_ranks


def _port() -> str:
    return os.environ["MASTER_PORT"]


def test_shared_memory_loses_its_name_while_it_is_used():
    first, second = run_ranks(2, _port)
    assert first == second
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{first}_*"))
