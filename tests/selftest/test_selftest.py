"""The self-test as a user runs it, and whether it would notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, call
from sra_ds.ops.extension import extension

KERNELS = ["reference", "compiled"] if "cpu" in extension().devices else ["reference"]
SELFTEST = ROOT / "tools" / "selftest.py"


def test_two_processes_pass_and_say_so() -> None:
    result = call(sys.executable, SELFTEST, "--world", 2, "--kills", 3, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] and len(found["layouts"]) == 24 * len(KERNELS)
    assert {(row["expert_parallel"], row["zero"]) for row in found["layouts"]} == {
        (size, zero) for size in (1, 2) for zero in (0, 1, 2, 3)
    }
    assert found["killed"]["kills"] == 3 and found["killed"]["loss_difference"] < 1e-6
    assert all(step > 0 for step in found["killed"]["killed_after_step"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_four_processes_pass() -> None:
    command = [sys.executable, SELFTEST, "--world", "4", "--kills", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NOT" not in result.stdout and result.stdout.count("same") == 32 * len(KERNELS) + 1


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    from sra_ds.selftest.killed import kill_and_resume

    script, config = ROOT / "launch" / "train.py", ROOT / "ds_configs" / "zero2.json"
    found = kill_and_resume(script, config, 1, tmp_path, 20)
    steps = found["killed_after_step"]
    assert len(steps) == 20 and steps == sorted(set(steps))  # each run got further, none to the end
    assert found["loss_difference"] == 0


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from sra_ds.moe.backends.deepspeed import DeepSpeedBackend

    right = DeepSpeedBackend.forward

    def twice_the_gradient(self, x_TD, routing):
        out_TD = right(self, x_TD, routing)
        return 2 * out_TD - out_TD.detach()

    monkeypatch.setattr(DeepSpeedBackend, "forward", twice_the_gradient)


def test_a_wrong_gradient_and_a_lost_optimizer_are_noticed(tmp_path: Path) -> None:
    from distributed import run_ranks

    (failed,) = run_ranks(1, one_case, str(tmp_path))
    assert failed == {"right": True, "wrong": False, "forgetful": False}


def one_case(folder: str) -> dict[str, bool]:
    from sra_ds.selftest import layouts

    reference = layouts._plain_torch(layouts._recipe(False))
    case = layouts.Case(2, "deepspeed", 1, False, "reference")
    right = layouts._run_case(case, reference, Path(folder) / "a", Path(folder) / "a")
    with pytest.MonkeyPatch.context() as monkeypatch:
        wrong_layer(monkeypatch)
        wrong = layouts._run_case(case, reference, Path(folder) / "b", Path(folder) / "b")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(layouts, "restore_engine", lambda *_: None)
        forgetful = layouts._run_case(case, reference, Path(folder) / "c", Path(folder) / "a")
    cases = {"right": right, "wrong": wrong, "forgetful": forgetful}
    return {name: row["passed"] for name, row in cases.items()}
