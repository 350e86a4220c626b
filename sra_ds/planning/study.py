"""The plans of some recipes over growing numbers of GPUs: tables and data for docs/scaling.md.

    weak    every GPU has the same tokens a step, so the batch grows with their number
    strong  the recipe's own batch, down to one window per GPU

For each number the recommended plan is kept. Calculated, not measured.
"""

from typing import Any

from sra_ds.config import Recipe
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.planning.hardware import EFFICIENCY, GB, GPUS, HOST_MEMORY, INTER_NODE, Network
from sra_ds.planning.plan import Candidate, candidates, recommended, with_training
from sra_ds.planning.request import Request
from sra_ds.planning.step_time import Machine

GPU, PER_NODE = "H100", 8
COUNTS = tuple(8 * 2**n for n in range(10))
"""8 to 4,096 GPUs."""
TOKENS_PER_GPU = 16_384
"""Of the weak study."""
COLUMNS = (
    ("recipe", "recipe"), ("gpus", "GPUs"), ("batch_tokens", "tokens a step"), ("config", "JSON"),
    ("ep", "ep"), ("micro", "micro-batch"), ("peak_gb", "GB a GPU"), ("step_ms", "step, ms"),
    ("tokens_per_second", "M tokens/s"), ("mfu", "MFU"), ("communication", "communication"),
    ("launches", "launches"),
)  # fmt: skip


def study(recipes: list[Recipe], configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows of both kinds, and what they assume."""
    gpu = GPUS[GPU]
    return {
        "gpu": gpu._asdict(),
        "gpus_per_node": PER_NODE,
        "inter_node_bytes_per_second": INTER_NODE,
        "efficiency": EFFICIENCY,
        "tokens_per_gpu": TOKENS_PER_GPU,
        "weak": [row for recipe in recipes for row in _rows(_weak(recipe), configs)],
        "strong": [row for recipe in recipes for row in _rows(_strong(recipe), configs)],
    }


def _weak(recipe: Recipe) -> dict[int, Recipe]:
    windows = TOKENS_PER_GPU // recipe.data.sequence_length
    return {
        gpus: with_training(recipe, batch_size=windows * gpus, micro_batch_size=0)
        for gpus in COUNTS
    }


def _strong(recipe: Recipe) -> dict[int, Recipe]:
    batch = recipe.training.batch_size
    own = with_training(recipe, micro_batch_size=0)
    return {gpus: own for gpus in COUNTS if batch % gpus == 0}


def _rows(cases: dict[int, Recipe], configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for gpus, recipe in cases.items():
        gpu = GPUS[GPU]
        network = Network(gpus // PER_NODE, PER_NODE, gpu.link, INTER_NODE)
        machine, host = Machine(gpu, network, EFFICIENCY), HOST_MEMORY * PER_NODE
        request = Request(recipe, machine, gpu.memory, host)
        best = recommended(candidates(request, configs))
        if best is not None:
            rows.append(_row(request, best))
    return rows


def _row(request: Request, best: Candidate) -> dict[str, Any]:
    case, memory, time = best.case, best.memory, best.time
    assert case is not None and memory is not None and time is not None
    recipe, bounds = case.recipe, (time.optimistic, time.conservative)
    flops = flops_per_token(build_model(recipe, "meta"), recipe.data.sequence_length)
    peak = request.machine.gpu.flops(case.width) * request.gpus
    return {
        "recipe": recipe.name,
        "gpus": request.gpus,
        "batch_tokens": case.step_tokens,
        "config": best.config,
        "ep": best.ep,
        "micro": case.windows,
        "accumulation": case.accumulation,
        "peak_bytes": memory.peak,
        "host_bytes_per_node": memory.host * PER_NODE,
        "seconds_per_step": list(bounds),
        "tokens_per_second": [case.step_tokens / seconds for seconds in bounds],
        "mfu": [case.step_tokens * flops / seconds / peak for seconds in bounds],
        "communication_share": time.communication / time.conservative,
        "launch_share": time.launches / time.conservative,
        "sent_wire_bytes": sum(transfer.wire_bytes for transfer in best.transfers),
    }


def study_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ranges go from the conservative to the optimistic bound, or the other way for times."""
    head = " | ".join(title for _, title in COLUMNS)
    lines = [f"| {head} |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    fast, slow = row["seconds_per_step"]
    best, worst = row["tokens_per_second"]
    high, low = row["mfu"]
    return [
        f"`{row['recipe']}`",
        f"{row['gpus']:,}",
        f"{row['batch_tokens']:,}",
        row["config"].removesuffix(".json"),
        str(row["ep"]),
        f"{row['micro']} x {row['accumulation']}",
        f"{row['peak_bytes'] / GB:.1f}",
        f"{fast * 1e3:.1f} - {slow * 1e3:.1f}",
        f"{worst / 1e6:.2f} - {best / 1e6:.2f}",
        f"{low:.0%} - {high:.0%}",
        f"{row['communication_share']:.0%}",
        f"{row['launch_share']:.0%}",
    ]
