"""A plan as plain text."""

from typing import Any

from sra_ds.planning.hardware import GB

HEAD = (
    "configuration", "ep", "micro", "param", "grad", "optim", "activ", "logits", "peak", "fits",
    "rows/expert", "step", "days",
)  # fmt: skip


def render(plan: dict[str, Any]) -> str:
    """The whole plan; sizes in decimal GB, times from the optimistic to the conservative bound."""
    gpu, network = plan["gpu"], plan["network"]
    lines = [
        f"{plan['recipe']}: {plan['parameters']['total'] / 1e6:,.1f} M parameters, "
        f"{plan['parameters']['active_with_anchors'] / 1e6:,.1f} M active",
        f"{plan['gpus']} x {gpu['name']} ({gpu['source']}) planned with "
        f"{gpu['planned_memory'] / GB:.0f} GB, {plan['nodes']} node(s), "
        f"{network['intra'] / GB:.0f} GB/s within, {network['inter'] / GB:.0f} GB/s per GPU between",
        f"{plan['tokens_per_step']:,} tokens a step; {plan['token_budget'] / 1e9:,.2f} G tokens in all",
        f"experts are compute-bound from {plan['compute_bound_rows_per_expert']:.0f} rows each",
        "",
        *_columns([HEAD, *_rows(plan)]),
        "",
        "GB per GPU, each part at its own largest; peak is the largest moment of a step. fits: usual",
        "card sizes; * also the planned one. micro: windows x micro-batches, r with activation",
        "checkpointing. rows/expert: < where reading weights takes longer than the products. step: ms",
        "if everything overlaps - if nothing does. Expert parallelism across nodes is in --json.",
        "Calculated, not measured on any GPU.",
        *_break_even(plan["break_even"]),
        *_recommendation(plan["recommendation"]),
    ]
    return "\n".join(lines)


def _rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every configuration with expert parallelism within a node; refused sizes on one line."""
    rows: list[tuple[str, ...]] = []
    refused: dict[tuple[str, str], list[str]] = {}
    for row in plan["candidates"]:
        if row["expert_parallel_size"] > plan["network"]["gpus_per_node"]:
            continue
        name = row["config"].removesuffix(".json")
        if "refused" in row:
            refused.setdefault((name, row["refused"]), []).append(str(row["expert_parallel_size"]))
        else:
            rows.append(_cells(row))
    return [*rows, *((n, ",".join(sizes), reason) for (n, reason), sizes in refused.items())]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    start = (row["config"].removesuffix(".json"), str(row["expert_parallel_size"]))
    memory, seconds = row["memory_bytes"], row["seconds_per_step"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "peak")
    rows = row["tokens_per_expert"]
    recomputed = "r" if row["activation_checkpointing"] else ""
    return (
        *start,
        f"{row['micro_batch_size']}x{row['accumulation']}{recomputed}",
        *(f"{memory[part] / GB:.2f}" for part in parts),
        ("*" if row["fits"] else "-") + " " + ",".join(row["fits_cards"]),
        "" if rows is None else f"{rows:,.0f}{' <' if row['waits_for_weights'] else ''}",
        f"{seconds['optimistic'] * 1e3:,.0f}-{seconds['conservative'] * 1e3:,.0f}",
        f"{row['days'][0]:,.2f}-{row['days'][1]:,.2f}",
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned; a short row's last cell may be as long as it likes."""
    full = [row for row in rows if len(row) == len(HEAD)]
    widths = [max(len(row[column]) for row in full) for column in range(len(HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _break_even(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        "experts copied on every GPU, or spread: GB a GPU sends per step, and the tokens per",
    ]
    lines.append(f"GPU below which spreading sends less (here {rows[0]['tokens_per_gpu']:,.0f})")
    for row in rows:
        spread = row["all_reduce_spread"] + row["all_to_all"]
        lines.append(
            f"  ep {row['expert_parallel_size']:<3} all-reduce {row['all_reduce_copied'] / GB:.2f}; "
            f"spread {spread / GB:.2f}, of which all-to-all {row['all_to_all'] / GB:.2f}; "
            f"equal at {row['equal_at_tokens_per_gpu']:,.0f}"
        )
    return lines


def _recommendation(best: dict[str, Any] | None) -> list[str]:
    if best is None:
        return [
            "",
            "nothing fits: more GPUs or memory, or a shorter data.sequence_length",
        ]
    seconds, sent = best["seconds_per_step"], best["sent_per_step"]
    lines = ["", f"recommended: {best['config']} with {' '.join(best['overrides'])}"]
    lines += [
        f"  sends {name}: {one['bytes'] / GB:.3f} GB given, {one['wire_bytes'] / GB:.3f} GB on the wire, "
        f"{one['calls']:,.0f} calls"
        for name, one in sent.items()
    ]
    lines.append(
        f"  step {seconds['optimistic'] * 1e3:,.0f}-{seconds['conservative'] * 1e3:,.0f} ms: compute "
        f"{seconds['compute'] * 1e3:,.0f}, communication {seconds['communication'] * 1e3:,.0f}, update "
        f"{seconds['update'] * 1e3:,.0f}; {best['days'][0]:,.2f}-{best['days'][1]:,.2f} days"
    )
    if best["cost"] is not None:
        lines.append(
            f"  cost {best['cost'][0]:,.0f}-{best['cost'][1]:,.0f} in the price's currency"
        )
    lines += ["", best["command"]]
    return lines + ([best["slurm"]] if "slurm" in best else [])
