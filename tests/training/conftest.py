import shutil

import pytest

from commands import train, write_corpus, write_recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a corpus and `tiny.yaml`, its data prepared on first use."""
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder, write_corpus(folder / "text.jsonl"))
    return folder


@pytest.fixture(scope="session")
def finished(tiny):
    """Finished runs of the tiny recipe by ZeRO stage, each trained once a session."""
    done = {}

    def at_stage(stage):
        if stage not in done:
            run = tiny / f"zero{stage}"
            result = train(
                "--recipe",
                tiny / "tiny.yaml",
                "--run",
                run,
                "training.top_k_schedule=[[0,1],[0.5,2]]",
                "training.selection_bias_rate=0.01",
                stage=stage,
            )
            assert result.returncode == 0, result.stderr
            done[stage] = run
        return done[stage]

    return at_stage


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of a finished run as a crash after step 8 would have left it."""

    def at_stage(stage):
        run = tmp_path / f"interrupted{stage}"
        shutil.copytree(finished(stage), run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / "12")
        (run / "checkpoints" / "best").unlink()
        (run / "summary.json").unlink()
        (run / "checkpoints" / "latest").write_text("8")
        return run

    return at_stage
