"""A start names the host that does not answer, whatever keeps it, and costs a healthy run nothing."""

import multiprocessing
import socket
import sys
import time
from pathlib import Path

import pytest

from commands import call
from sra_ds.errors import ConfigError
from sra_ds.training import rendezvous

SECONDS = 2.0
WORLD = 3


@pytest.fixture(scope="module")
def fork_server():
    """Processes that have imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sra_ds.training.rendezvous"])
    return context


@pytest.fixture
def meet(fork_server, tmp_path, monkeypatch):
    """`meet({rank: misbehaviour})` starts these ranks of three; what each of them said, by rank."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from meeting import attend

    processes = []

    def start(attending, **variables):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        asked = {
            "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SRA_START_TIMEOUT": str(SECONDS),
        } | variables
        for path in tmp_path.glob("[0-9]"):
            path.unlink()
        for rank, misbehaviour in attending.items():
            arguments = (rank, tmp_path, asked, misbehaviour)
            processes.append(fork_server.Process(target=attend, args=arguments, daemon=True))
            processes[-1].start()
        deadline = time.monotonic() + 60
        while any(
            not misbehaviour and not (tmp_path / str(rank)).exists()
            for rank, misbehaviour in attending.items()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.1)
        return {int(path.name): path.read_text() for path in tmp_path.glob("[0-9]")}

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_healthy_start_takes_no_time(meet):
    meet({0: "", 1: "", 2: ""})  # the server of forked processes starts
    took = meet({0: "", 1: "", 2: ""})
    assert sorted(took) == [0, 1, 2]
    assert (
        max(map(float, took.values())) < SECONDS / 2
    )  # no time-out and no long pause is waited for


def test_a_rank_that_never_comes_is_named_with_the_host_of_the_hostfile(meet, tmp_path):
    (tmp_path / "hostfile").write_text("# ours\nalpha slots=1\nbeta slots=1\ngamma slots=1\n")
    said = meet({0: "", 1: ""}, SRA_HOSTFILE=str(tmp_path / "hostfile"))
    assert said[0] == said[1]
    assert said[0].startswith("TrainingError: no answer from gamma (rank 2) within 2 s: 2 of 3")
    assert "\n" not in said[0] and "SRA_START_TIMEOUT" in said[0]


def test_a_first_rank_that_never_comes_is_named(meet):
    said = meet({1: "", 2: ""})
    for rank in (1, 2):
        assert f"rank {rank} on host-{rank} did not find rank 0 on node 1 of 3" in said[rank]
        assert "MASTER_ADDR" in said[rank]


@pytest.mark.parametrize(
    ("misbehaviour", "words"),
    [
        ("freezes", "no answer from host-1 (rank 1) after the roll call"),
        ("is killed later", "no answer from host-1 (rank 1) after the roll call"),
        ("is busy", "host-1 (rank 1) came to the roll call but not to the first collective"),
        ("fails", "host-1 (rank 1) could not join the others: the accelerator is on fire;"),
    ],
)
def test_a_rank_that_came_but_does_not_answer_a_collective_is_named(meet, misbehaviour, words):
    said = meet({0: "", 1: misbehaviour, 2: ""})
    for rank in (0, 2):
        assert said[rank].startswith(f"TrainingError: {words}"), said
        assert "\n" not in said[rank]
    if misbehaviour == "fails":
        assert said[1].startswith("ValueError: the accelerator is on fire")


def test_a_first_rank_that_freezes_takes_nobody_with_it(meet):
    said = meet({0: "freezes later", 1: "", 2: ""})
    for rank in (1, 2):
        assert f"rank {rank} on host-{rank} lost rank 0" in said[rank]


def test_under_torchrun_the_agent_keeps_the_store(tmp_path):
    program = Path(__file__).parent / "meeting.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = call(*torchrun, program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(float((tmp_path / str(rank)).read_text()) < 60 for rank in (0, 1))


def test_one_process_meets_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    joined = []
    rendezvous.start_together(lambda: joined.append(True))
    assert joined == [True]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("SRA_START_TIMEOUT", text)
    with pytest.raises(ConfigError, match=f"SRA_START_TIMEOUT={text}"):
        rendezvous.allowed_seconds()


PLANS = {
    "slurm": (
        {"SLURM_STEP_NODELIST": "gpu[7-8]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        ["gpu7", "gpu7", "gpu8", "gpu8"],
    ),
    "slurm, uneven": (
        {"SLURM_STEP_NODELIST": "gpu[7-8]", "SLURM_STEP_TASKS_PER_NODE": "3,1"},
        ["gpu7", "gpu7", "gpu7", "gpu8"],
    ),
    "slurm, one launcher a node": (
        {"SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_TASKS_PER_NODE": "1(x2)"},
        ["gpu7", "gpu7", "gpu8", "gpu8"],
    ),
    "slurm, not to be expanded": (
        {"SLURM_STEP_NODELIST": "gpu[3-9]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        ["node 1 of 2", "node 1 of 2", "node 2 of 2", "node 2 of 2"],
    ),
    "torchrun": (
        {"LOCAL_WORLD_SIZE": "2"},
        ["node 1 of 2", "node 1 of 2", "node 2 of 2", "node 2 of 2"],
    ),
    "one host": ({"LOCAL_WORLD_SIZE": "4"}, ["here"] * 4),
    "by hand": ({"LOCAL_WORLD_SIZE": ""}, ["a host unknown here"] * 4),
}


@pytest.mark.parametrize("plan", PLANS)
def test_where_ranks_were_meant_to_be(monkeypatch, tmp_path, plan):
    variables, hosts = PLANS[plan]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu[7-8]" ] && printf "gpu7\\ngpu8\\n"\n')
    scontrol.chmod(0o755)
    known = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURMD_NODENAME": "here"}
    for key, value in {**known, "PATH": f"{tmp_path}:/bin:/usr/bin", **variables}.items():
        monkeypatch.setenv(key, value)
    assert rendezvous.planned_hosts() == hosts
