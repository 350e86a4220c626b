"""The directions of imports, read from the source without running it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sra_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {
    "errors",
    "heap",
    "intervals",
    "timing",
    "config",
    "ops",
    "data",
    "moe",
    "model",
    "losses",
    "metrics",
    "processes",
    "layers",
    "seeds",
    "files",
}
ALLOWED = {
    "errors": set(),
    "heap": set(),
    "intervals": set(),
    "timing": set(),
    "processes": set(),
    "seeds": set(),
    "files": set(),
    "layers": {"ops"},
    "config": {"errors"},
    "ops": {"errors", "files"},
    "data": {"errors", "config", "files"},
    "moe": {"errors", "config", "ops", "layers"},
    "model": {"errors", "config", "ops", "layers", "seeds", "moe"},
    "losses": {"moe", "config"},
    "metrics": {"moe", "ops"},
    "storage": FOUNDATION,
    "training": FOUNDATION | {"storage"},
    "evaluation": FOUNDATION | {"storage", "inference"},
    "analysis": FOUNDATION | {"storage", "inference", "evaluation"},
    "inference": FOUNDATION | {"storage"},
    "steering": FOUNDATION | {"storage", "inference", "evaluation", "analysis"},
    "cli": {"errors"},
    "benchmarks": FOUNDATION | {"training"},
    "planning": {"errors", "config", "model", "moe", "training"},
    "workflow": FOUNDATION
    | {"storage", "training", "evaluation", "analysis", "inference", "planning"},
    "selftest": FOUNDATION | {"storage", "training", "inference", "planning"},
    "__init__": FOUNDATION | {"storage", "evaluation", "analysis", "inference"},
}
OWNERS = {
    "deepspeed": {
        "training/engine.py",
        "training/processes.py",
        "training/prebuild.py",
        "benchmarks/experts.py",
        "moe/backends/deepspeed.py",
        "moe/deepspeed_gate.py",
    },
    "megablocks": {"moe/backends/megablocks.py"},
    "triton": {"moe/backends/megablocks.py"},
    "matplotlib": {
        "analysis/plots.py",
        "analysis/canvas.py",
        "analysis/coherence_plots.py",
        "analysis/moe_plots.py",
        "analysis/expert_plots.py",
        "analysis/resonance_plots.py",
        "analysis/spectral_plots.py",
    },
    "pywt": {"model/mixers/filters.py"},
    "HanTa": {"analysis/syntax.py", "evaluation/coherence/tagging.py"},
    "pysbd": {"evaluation/coherence/sentences.py"},
    "umap": {"analysis/anchors.py"},
    "jinja2": {"analysis/report.py"},
    "transformers": {
        "inference/hf/configuration_sra.py",
        "inference/hf/modeling_sra.py",
        "evaluation/coherence/encoder.py",
        "evaluation/coherence/hf_model.py",
    },
    "wandb": {"training/logging.py"},
    "argparse": {"cli.py"},
}


def imports(path: Path) -> list[str]:
    """Dotted names of all modules a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(path: Path) -> str:
    """The package or top-level module a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    own = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sra_ds" or len(parts) < 2 or parts[1] == own:
            continue
        assert parts[1] in ALLOWED[own], f"{own} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_owner(path):
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or relative in owners, f"{relative} may not import {name}"


def test_config_and_errors_import_no_torch():
    for path in FILES:
        if part_of(path) in ("config", "errors"):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_parts_of_the_model_do_not_import_each_other():
    folders = ("embeddings", "mixers", "channels", "memories", "heads")
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        if parts[0] != "model" or parts[1] not in folders:
            continue
        for name in imports(path):
            other = name.split(".")[2:3]
            if name.startswith("sra_ds.model.") and other and other[0] in folders:
                assert other[0] == parts[1], f"{path} imports {name}"


def test_tools_are_thin():
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 80, path


def test_functions_and_files_stay_small():
    for path in FILES:
        assert len(path.read_text("utf-8").splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno <= 70, f"{path}:{node.name}"
