"""A plan as plain text, at most `WIDTH` columns but for commands."""

import textwrap
from typing import Any

from sra_ds.planning.hardware import GB
from sra_ds.planning.units import SECONDS_PER_DAY, count, digits, span

WIDTH = 100
HEAD = (
    "configuration", "ep", "type", "micro", "param", "grad", "optim", "activ", "peak", "host", "card",
    "rows", "step",
)  # fmt: skip
LEGEND = """\
GB per GPU, each part at its own largest; activ: activations and logits; peak: the largest moment
of a step. host: GB of a node's memory. card: * if it fits here; GB of the smallest usual card that
holds some micro-batch. micro: windows x micro-batches, r with activation checkpointing. rows: of
an expert per micro-batch, < below the threshold. step: if everything overlaps (more than can) - if
nothing does."""


def render(plan: dict[str, Any]) -> str:
    """The whole plan, the recommendation first; sizes in decimal GB."""
    lines = [
        *_head(plan),
        "",
        *_recommendation(plan),
        "",
        *_columns([HEAD, *_rows(plan)]),
        *_refused(plan),
        "",
        LEGEND,
        *_remarks(plan),
        *_break_even(plan["break_even"]),
    ]
    return "\n".join(lines)


def _head(plan: dict[str, Any]) -> list[str]:
    gpu, network, several = plan["gpu"], plan["network"], plan["nodes"] > 1
    between = f", {network['inter'] / GB:,.0f} between nodes" if several else ""
    nodes = f"{plan['nodes']} nodes" if several else "one node"
    return [
        f"{plan['recipe']}: {count(plan['parameters']['total'])} parameters, "
        f"{count(plan['parameters']['active_with_anchors'])} active; "
        f"{count(plan['tokens_per_step'])} tokens a step, {count(plan['token_budget'])} in all",
        f"{plan['gpus']:,} x {gpu['name']} with {gpu['planned_memory'] / GB:,.0f} GB on {nodes} of "
        f"{plan['host_memory_of_a_node'] / GB:,.0f} GB; "
        f"{network['intra'] / GB:,.0f} GB/s per GPU within{between}",
        f"GPU as in: {gpu['source']}",
    ]


def _recommendation(plan: dict[str, Any]) -> list[str]:
    best = plan["recommendation"]
    if best is None:
        return ["nothing fits: more GPUs, memory of GPU or host, or a shorter data.sequence_length"]
    seconds, memory = best["seconds_per_step"], best["memory_bytes"]
    days = [day * SECONDS_PER_DAY for day in best["days"]]
    parts = ("compute", "launches", "communication", "offload", "update")
    spent = ", ".join(
        f"{part} {digits(seconds[part] * 1e3)}" for part in parts if seconds[part] >= 5e-6
    )
    lines = [
        f"recommended: {best['config']} with",
        *_wrapped("  " + " ".join(best["overrides"])),
        f"  memory: {memory['peak'] / GB:.1f} GB of each GPU, "
        f"{best['host_bytes_per_node'] / GB:.1f} GB of each node's",
        f"  step:   {span(seconds['optimistic'], seconds['conservative'])}",
        *_wrapped(f"    ms: {spent}"),
        f"  run:    {span(*days)}{_cost(best['cost'])}",
    ]
    lines += [
        f"  sends {name}: {one['bytes'] / GB:.3f} GB given, {one['wire_bytes'] / GB:.3f} on the wire, "
        f"{one['calls']:,.0f} calls"
        for name, one in best["sent_per_step"].items()
        if one["bytes"] >= GB / 2000
    ]
    lines += [
        f"  host traffic, {name}: {size / GB:,.3f} GB"
        for name, size in best["host_traffic_per_step"].items()
        if size >= GB / 2000
    ]
    lines += ["", best["command"]]
    return lines + ([best["slurm"]] if "slurm" in best else [])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _cost(cost: list[float] | None) -> str:
    if cost is None:
        return ""
    return f"; {digits(cost[0])}-{digits(cost[1])} in the price's currency"


def _rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every configuration that can run, with expert parallelism within a node."""
    per_node = plan["network"]["gpus_per_node"]
    return [
        _cells(row)
        for row in plan["candidates"]
        if row["expert_parallel_size"] <= per_node and "refused" not in row
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    memory, seconds, rows = row["memory_bytes"], row["seconds_per_step"], row["tokens_per_expert"]
    recomputed = "r" if row["activation_checkpointing"] else ""
    parts = (
        memory["parameters"], memory["gradients"], memory["optimizer"],
        memory["activations"] + memory["logits"], memory["peak"], row["host_bytes_per_node"],
    )  # fmt: skip
    waits = " <" if row["waits_for_weights"] else ""
    return (
        row["config"].removesuffix(".json"),
        str(row["expert_parallel_size"]),
        row["precision"],
        f"{row['micro_batch_size']}x{row['accumulation']}{recomputed}",
        *(f"{part / GB:,.1f}" for part in parts),
        ("* " if row["fits"] else "- ") + (row["fits_cards"] or ["none"])[0].removesuffix("GB"),
        "" if rows is None else f"{rows:,.0f}{waits}",
        span(seconds["optimistic"], seconds["conservative"]),
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return [
        " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _refused(plan: dict[str, Any]) -> list[str]:
    """Sizes that cannot be run, one paragraph per reason."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for row in plan["candidates"]:
        if "refused" in row:
            key = (row["config"].removesuffix(".json"), row["refused"])
            sizes.setdefault(key, []).append(str(row["expert_parallel_size"]))
    return [
        line
        for (name, reason), eps in sizes.items()
        for line in _wrapped(f"{name} ep {', '.join(eps)}: {reason}")
    ]


def _remarks(plan: dict[str, Any]) -> list[str]:
    lines = []
    if plan["nodes"] > 1:
        lines.append("Expert parallelism across nodes is in --json.")
    if plan["experts_per_token"] is not None:
        busy = plan["compute_bound_rows_per_expert"]
        limits = ", ".join(f"{rows:,.0f} in {name}" for name, rows in busy.items())
        lines.append(f"Threshold of rows (peak FLOP/s x bytes / (2 x bandwidth)): {limits}.")
    if plan["ignored_top_k_schedule"]:
        k = plan["experts_per_token"]
        lines.append(f"training.top_k_schedule is not followed: {k} experts per token throughout.")
    return [
        *lines,
        "Calculated from data sheets and assumptions (--json), not measured on any GPU.",
    ]


def _break_even(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "experts copied on every GPU, or spread: GB a GPU sends per step for their gradients' all-reduce",
        "and the all-to-all of tokens, and the tokens per GPU below which spreading sends less (here "
        f"{count(rows[0]['tokens_per_gpu'])};",
        "1.5 times as many where ZeRO-1 or 2 all-gathers updated parameters, too)",
    ]
    for row in rows:
        spread = row["all_reduce_spread"] + row["all_to_all"]
        lines.append(
            f"  ep {row['expert_parallel_size']:<3} all-reduce {row['all_reduce_copied'] / GB:.2f}; "
            f"spread {spread / GB:.2f}, of which all-to-all {row['all_to_all'] / GB:.2f}; "
            f"equal at {row['equal_at_tokens_per_gpu']:,.0f}"
        )
    return lines
