"""Two hosts: network namespaces joined by one cable, each with a name and an /etc/hosts of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from commands import losses

NAMES = ("alpha", "beta")
SPACES = {name: f"sra{os.getpid()}-{name}" for name in NAMES}


def ip(*arguments):
    """The `ip` command; its error, if it has one."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return result.stderr if result.returncode else ""


def missing():
    """Why there can be no two hosts here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "ip (iproute2) or unshare (util-linux) is not installed"
    problem = ip("netns", "add", f"sra{os.getpid()}-probe")
    ip("netns", "delete", f"sra{os.getpid()}-probe")
    return f"no network namespace can be made: {problem.strip()}" if problem else ""


@pytest.fixture(scope="module")
def hosts():
    """The variables with which the stub srun starts a task on its host."""
    if reason := missing():
        pytest.skip(reason)
    folders = [Path("/etc/netns") / space for space in SPACES.values()]
    try:
        for folder, space in zip(folders, SPACES.values(), strict=True):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 alpha\n10.77.0.2 beta\n")
            assert not ip("netns", "add", space)
            assert not ip("-n", space, "link", "set", "lo", "up")
        ends = ["link", "add", "cable", "netns", SPACES["alpha"], "type", "veth"]
        assert not ip(*ends, "peer", "name", "cable", "netns", SPACES["beta"])
        for number, space in enumerate(SPACES.values(), start=1):
            assert not ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            assert not ip("-n", space, "link", "set", "cable", "up")
        named = 'hostname $SLURMD_NODENAME; exec "$@"'
        yield {
            "STUB_ENTER": f"ip netns exec sra{os.getpid()}-{{node}} unshare --uts "
            f"sh -c '{named}' sh",
            "GLOO_SOCKET_IFNAME": "cable",
        }
    finally:
        for folder, space in zip(folders, SPACES.values(), strict=True):
            ip("netns", "delete", space)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cut(hosts):
    """The cable, drawn out at beta."""
    ip("-n", SPACES["beta"], "link", "set", "cable", "down")
    yield
    ip("-n", SPACES["beta"], "link", "set", "cable", "up")


def test_two_hosts_train_as_one_does(slurm, tiny, tmp_path, hosts, sixty_steps, undisturbed):
    run = tmp_path / "run"
    variables = {"hosts": "alpha,beta", "tasks": 1, "RECIPE": tiny / "tiny.yaml", "RUN": run}
    code = slurm.run("many_nodes.sbatch", *sixty_steps, **variables, **hosts)
    assert code == 0, slurm.log.read_text()
    assert losses(run) == losses(undisturbed)


def test_a_host_that_is_cut_off_is_named(slurm, tiny, tmp_path, hosts, cut, sixty_steps):
    variables = {"hosts": "alpha,beta", "tasks": 1, "RECIPE": tiny / "tiny.yaml"}
    variables |= {"RUN": tmp_path / "run", "SRA_START_TIMEOUT": 5}
    assert slurm.run("many_nodes.sbatch", *sixty_steps, **variables, **hosts) == 1
    text = slurm.log.read_text()
    assert "error: no answer from beta (rank 1) within 5 s: 1 of 2 processes came to alpha:" in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
    assert slurm.requeued == []
