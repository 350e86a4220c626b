"""What a finished run leaves for people: figures, sample texts and `summary.json`, from its files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sra_ds.analysis.moe_plots import Connections
from sra_ds.analysis.plots import Shown, draw_run
from sra_ds.analysis.spectral_plots import Spectrum
from sra_ds.evaluation.experts import last_specialisation
from sra_ds.inference.generate import generate
from sra_ds.inference.load import LoadedRun, load_run
from sra_ds.model.channels.prime_masked import SparseLinear
from sra_ds.model.counting import count_parameters
from sra_ds.model.embeddings.spectral import Waves
from sra_ds.storage.run_dir import RunDir, write_atomically
from sra_ds.training.environment import peak_memory
from sra_ds.training.loop import Outcome
from sra_ds.workflow.resolve import Resolved


def report(run: RunDir, resolved: Resolved, outcome: Outcome) -> dict[str, Any]:
    """Write everything and return the summary."""
    loaded = load_run(run.path, "latest", resolved.device)
    recipe = resolved.recipe
    draw_figures(loaded, run)
    counts = count_parameters(loaded.model)
    summary = {
        "recipe": recipe.name,
        "run": str(run.path),
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens / max(outcome.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(resolved.device),
        "params": {"total": counts["total"], "active": counts["active"]},
        "validation": outcome.validation,
        "experts": outcome.experts,
        "best": outcome.best,
        "specialisation": last_specialisation(run.metrics()),
        "device": f"{resolved.device} ({resolved.reasons['device']})",
        "kernel": resolved.reasons["kernels"],
        "corpus_fingerprint": run.environment()["corpus_fingerprint"],
        "samples": write_samples(loaded, run),
    }
    write_atomically(run.summary_file, json.dumps(summary, indent=1))
    return summary


def draw_figures(loaded: LoadedRun, run: RunDir) -> list[Path]:
    """Redraw the run's figures from its files."""
    snapshots = sorted(run.routing.glob("*.safetensors"), key=lambda path: int(path.stem))
    load_LE = load_file(snapshots[-1])["load_LE"].numpy() if snapshots else ()
    slots_L = [router.slots for router in loaded.model.routers()]
    loads = [load_E[:slots] for load_E, slots in zip(load_LE, slots_L, strict=bool(snapshots))]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(loaded.model.parameters()).device)
    with torch.no_grad():
        grams = [gram.float().cpu().numpy() for gram in loaded.model(ids).anchor_grams]
    first: Any = loaded.model.blocks[0]
    masks = {
        name.rpartition(".")[2]: module.live_mask().cpu().numpy()
        for name, module in first.named_modules()
        if isinstance(module, SparseLinear)
    }
    connections = []
    for layer in loaded.model.routed_layers():
        if layer.coupling is not None:
            last: Any = layer.coupling.rounds[-1]
            strengths = last.strengths(layer.router.slots).cpu().numpy()
            connections.append(Connections(strengths, last.hyperedges(layer.router.slots)))
    embedding = loaded.model.embedding
    spectrum = None
    if isinstance(embedding, Waves):
        spectrum = Spectrum(embedding.frequencies().numpy(), embedding.spectrum().cpu().numpy())
    shown = Shown(loads, grams, masks, connections, spectrum)
    return draw_run(run.metrics(), shown, run.figures)


def write_samples(loaded: LoadedRun, run: RunDir) -> dict[str, str]:
    """Continue the recipe's prompts and keep the texts."""
    logging = loaded.recipe.logging
    samples = {
        prompt: "".join(generate(loaded.model, loaded.tokenizer, prompt, logging.sample_tokens))
        for prompt in logging.prompts
    }
    text = "\n\n".join(f">>> {prompt}\n{prompt}{rest}" for prompt, rest in samples.items())
    write_atomically(run.samples_file, text + "\n")
    return samples
