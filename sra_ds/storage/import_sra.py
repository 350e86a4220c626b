"""Weights of the published SRA code (a `.pt` file with `model_state_dict`) as a run directory.

    token_embed.weight                      embedding.weight            (lm_head is tied to it)
    blocks.i.ln1, ln2, ln_f                 blocks.i.mixer_norm, channel_norm, final_norm
    blocks.i.attn.{Wq,Wk,Wv}, Wo            blocks.i.mixer.qkv (stacked), mixer.out
    blocks.i.ff_or_moe.experts.e.linear1/2  channel.moe.backend.experts.{up,down}_{weight,bias}[e]
    blocks.i.ff_or_moe.linear1/2 (dense)    channel.feed_forward.up/down
    blocks.i.ff_or_moe.semantic_anchors     channel.moe.router.anchors
    blocks.i.ff_or_moe.temperature, gate    channel.moe.router.temperature, router.weight

The file is unpickled with `weights_only`, which admits tensors and plain values. Its rotary convention is
ours; its optimizer state is not taken.
"""

import shutil
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.data.tokenizer import load_tokenizer
from sra_ds.errors import CheckpointError
from sra_ds.model.language_model import build_model
from sra_ds.storage import checkpoint
from sra_ds.storage.checkpoint import WEIGHTS, Contents, Layout
from sra_ds.storage.fragments import whole_tensor
from sra_ds.storage.run_dir import RunDir, complete_or_absent, refuse_taken

PREFIXES = ("module.", "_orig_mod.")
RANDOM_STATE = (  # numpy's generator state, which the published trainer saves beside the weights
    np.ndarray, np.dtype, np.dtypes.UInt32DType, np.dtypes.UInt64DType, np.dtypes.Int64DType,
    np._core.multiarray._reconstruct, np._core.multiarray.scalar,  # type: ignore[attr-defined]
)  # fmt: skip


def import_sra(file: Path, recipe: Recipe, tokenizer: Path, out: RunDir) -> dict[str, Any]:
    """Write a run directory with the file's weights, which must fit the recipe exactly; returns where.
    Raises `CheckpointError` for a file of another kind or model."""
    refuse_taken(out)
    load_tokenizer(tokenizer, recipe.data.tokenizer.vocab_size)
    found = _read(file)
    step = found.get("global_step", 0)
    if not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"{file}: global_step is {step!r}, not a number of steps")
    weights = rename(found["model_state_dict"], recipe.model.layers)
    model = build_model(recipe)
    own = model.state_dict()
    buffers = {name: value for name, value in model.named_buffers() if name in own}
    weights = {**buffers, **weights}
    wrong = [n for n in own if n not in weights or weights[n].shape != own[n].shape]
    wrong += [n for n in weights if n not in own]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit recipe {recipe.name}: {wrong[0]} differs ({len(wrong)} in all)"
        )
    channel = recipe.model.channel
    top_k = channel.top_k if isinstance(channel, MoEChannelConfig) else None
    tensors = {WEIGHTS: {name: whole_tensor(weights[name].float()) for name in own}}
    contents = Contents(tensors, {"step": int(step), "top_k": top_k}, {})
    with complete_or_absent(out) as new:
        new.write_start(recipe, {}, {"imported_from": file.name, "time": time.time()})
        shutil.copyfile(tokenizer, new.tokenizer_file)
        checkpoint.save_parts(new.checkpoints / str(step), [contents], Layout())
        checkpoint.point_latest_at(new.checkpoints / str(step))
    return {"run": str(out.path), "step": int(step), "tensors": len(own)}


def rename(published: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors under our names and shapes. Raises `CheckpointError` for a missing one."""
    state = {_plain(name): value for name, value in published.items()}

    def take(name: str) -> Tensor:
        try:
            return state[name]
        except KeyError:
            raise CheckpointError(f"the published checkpoint has no {name}") from None

    found = {"embedding.weight": take("token_embed.weight")}
    for part in ("weight", "bias"):
        found[f"final_norm.{part}"] = take(f"ln_f.{part}")
        for i in range(layers):
            theirs, ours = f"blocks.{i}", f"blocks.{i}"
            found[f"{ours}.mixer_norm.{part}"] = take(f"{theirs}.ln1.{part}")
            found[f"{ours}.channel_norm.{part}"] = take(f"{theirs}.ln2.{part}")
            projections = [take(f"{theirs}.attn.W{letter}.{part}") for letter in "qkv"]
            found[f"{ours}.mixer.qkv.{part}"] = torch.cat(projections)
            found[f"{ours}.mixer.out.{part}"] = take(f"{theirs}.attn.Wo.{part}")
    for i in range(layers):
        channel = {
            name.removeprefix(f"blocks.{i}.ff_or_moe."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{i}.ff_or_moe.")
        }
        found |= {f"blocks.{i}.channel.{n}": v for n, v in _channel(channel).items()}
    return found


def _channel(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """A feed-forward network, or router and stacked experts (whose weights we keep transposed)."""
    sides = {"up": "linear1", "down": "linear2"}
    if "linear1.weight" in published:
        return {
            f"feed_forward.{ours}.{part}": published[f"{theirs}.{part}"]
            for ours, theirs in sides.items()
            for part in ("weight", "bias")
        }
    experts = sum(name.endswith(".linear1.weight") for name in published)
    found = {}
    for ours, theirs in sides.items():
        rows = [published[f"experts.{e}.{theirs}.weight"].T for e in range(experts)]
        found[f"moe.backend.experts.{ours}_weight"] = torch.stack(rows)
        rows = [published[f"experts.{e}.{theirs}.bias"] for e in range(experts)]
        found[f"moe.backend.experts.{ours}_bias"] = torch.stack(rows)
    routers = {"semantic_anchors": "anchors", "gate.weight": "weight"}
    found |= {f"moe.router.{routers[n]}": v for n, v in published.items() if n in routers}
    if "temperature" in published:
        found["moe.router.temperature"] = published["temperature"].reshape(1)
    return found


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _read(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(list(RANDOM_STATE)):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, IsADirectoryError):
        raise CheckpointError(
            f"{file} is not a torch file of tensors and plain values; nothing else is unpickled"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("model_state_dict"), dict):
        raise CheckpointError(f"{file} has no model_state_dict")
    return found
