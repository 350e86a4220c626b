"""What a model routed where, over held-out text: recorded once, read by every analysis.

    text -> model below its head -> counts (token type x expert, pairs of experts, domain x expert)
                                 -> decisions of every token, one or two bytes each
                                 -> what an untrained router would have decided on the same vectors

Memory holds the counts and one batch; the decisions go to the disk as they are made and come back
memory-mapped. Letters: N tokens, L routed layers, K experts per token, E experts, V token types.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sra_ds.analysis.counts import Counts, PairCounter, pair_counts
from sra_ds.config.model import MoEChannelConfig
from sra_ds.data.loader import IGNORED, Batch, scoring_batches, scoring_windows
from sra_ds.data.shards import TokenSplit
from sra_ds.errors import DataError
from sra_ds.heap import giving_back
from sra_ds.model.init import initialise_router
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.routers import build_router
from sra_ds.moe.routing import Routing
from sra_ds.storage.run_dir import finished_folder, read_json_object, write_atomically

SCHEMA_VERSION = 1
MANIFEST = "trace.json"
GATE_STEPS = 65_535
"""Gates are kept as whole multiples of 1 / 65,535."""
UNTRAINED_SEED = 1_000_003
"""Of the routers that stand beside the trained ones; no run's seed, so no run's initial anchors."""


class Pass(NamedTuple):
    """How the text goes through the model."""

    length: int
    """Tokens a window (T)."""
    batch_size: int
    end_of_text_id: int
    max_tokens: int = 0
    """Tokens to trace; 0: all."""
    device: torch.device = torch.device("cpu")


class Trace:
    """A recorded pass. Arrays are memory-mapped; those with a place for each expert end in zeros where a
    layer has fewer than another (`slots_L`: ghosts). Raises `DataError` for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise DataError(f"{folder} is not a routing trace (it has no {MANIFEST})")
        self.facts = read_json_object(folder / MANIFEST)
        if self.facts.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"{folder}: a routing trace of another version; delete the folder")
        self.tokens = int(self.facts["tokens"])
        self.layers, self.experts = int(self.facts["layers"]), int(self.facts["experts"])
        self.slots_L: list[int] = self.facts.get("slots", [self.experts] * self.layers)
        self.top_k, self.vocab_size = int(self.facts["top_k"]), int(self.facts["vocab_size"])
        self.domains: list[str] = self.facts["domains"]
        shape = (self.tokens, self.layers, self.top_k)
        self.tokens_N = self._map("tokens", self.facts["token_dtype"], (self.tokens,))
        self.experts_NLK = self._map("experts", self.facts["expert_dtype"], shape)
        self.untrained_NLK = self._map("untrained", self.facts["expert_dtype"], shape)
        self.gates_NLK = self._map("gates", "uint16", shape)

    def counts(self, layer: int) -> Counts:
        """Routes from each token type to each expert of a layer."""
        return Counts(*(self._saved[f"tokens{layer}_{name}"] for name in Counts._fields))

    @cached_property
    def load_LE(self) -> NDArray[np.int64]:
        """Routes to each expert."""
        return self.pairs_LEE.diagonal(axis1=1, axis2=2)

    @cached_property
    def pairs_LEE(self) -> NDArray[np.int64]:
        """Tokens that two experts served together; on the diagonal the load."""
        return self._array("pairs_LEE")

    @property
    def domain_loads_LGE(self) -> NDArray[np.int64]:
        """Routes from each of G domains."""
        return self._array("domain_loads_LGE")

    @property
    def centroids_LED(self) -> NDArray[np.float32]:
        """Mean of the vectors an expert was given; zero where it was given none."""
        return self._array("centroids_LED")

    @cached_property
    def expert_means(self) -> dict[str, NDArray[np.float64]]:
        """Per layer and expert: mean gate and score, and the mean lead of the best score over the second
        where it is the first choice; NaN where it is never a choice, or never the first."""
        return {name: self._array(f"{name}_LE") for name in ("gate", "score", "margin")}

    @cached_property
    def documents(self) -> NDArray[Any]:
        """First token and domain number of each traced document."""
        return self._array("documents")

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.folder / f"{name}.bin"
        if path.stat().st_size != np.prod(shape) * np.dtype(dtype).itemsize:
            raise DataError(f"{path} is damaged (its size is wrong); delete {self.folder}")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._saved[name]
        return array

    @cached_property
    def _saved(self) -> Any:
        return np.load(self.folder / "counts.npz", allow_pickle=False)


@torch.no_grad()
def record(
    model: LanguageModel, split: TokenSplit, how: Pass, folder: Path, identity: dict[str, Any]
) -> Trace:
    """Trace a split through a model in eval mode into `folder`, which is complete or absent afterwards;
    a folder that holds the trace of the same `identity` is read instead."""
    channel = model.config.channel
    if not isinstance(channel, MoEChannelConfig):
        raise DataError("the model has no routed layers; there is nothing to trace")
    if (folder / MANIFEST).is_file() and read_json_object(folder / MANIFEST)[
        "identity"
    ] == identity:
        return Trace(folder)
    with finished_folder(folder, "wait for it") as partial:
        writer = _Writer(model, channel, split, how, partial)
        facts = writer.run()
        manifest = {"schema_version": SCHEMA_VERSION, "identity": identity, **facts}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
    return Trace(folder)


def traced_tokens(split: TokenSplit, how: Pass) -> int:
    """Tokens that are routed: each but the last, which predicts nothing, up to the cap."""
    return min(how.max_tokens or split.tokens, split.tokens - 1)


def traced_batches(split: TokenSplit, how: Pass) -> Iterator[tuple[Batch, Tensor]]:
    """Every such token once as a counted position, with the stream position of its target."""
    windows = scoring_windows(traced_tokens(split, how) + 1, how.length, how.length)
    return scoring_batches(split, windows, how.length, how.batch_size, how.end_of_text_id)


class Observed(NamedTuple):
    """One routed layer on one batch of T tokens."""

    x_TD: Tensor
    routing: Routing
    untrained_ids_TK: Tensor


class _Writer:
    """One pass: counts in memory, decisions on the disk."""

    def __init__(
        self,
        model: LanguageModel,
        channel: MoEChannelConfig,
        split: TokenSplit,
        how: Pass,
        folder: Path,
    ) -> None:
        self.model, self.split, self.how, self.folder = model, split, how, folder
        self.layers = len(model.routers())
        self.slots_L = [router.slots for router in model.routers()]
        self.experts = max(self.slots_L)
        self.top_k = int(model.routers()[0].top_k)
        self.tokens = traced_tokens(split, how)
        self.token_dtype = "uint16" if model.vocab_size <= 2**16 else "uint32"
        self.expert_dtype = "uint8" if self.experts <= 2**8 else "uint16"
        self.documents = split.documents[split.documents["start"] < self.tokens]
        self.untrained = _untrained_routers(model, channel, self.top_k, how.device)
        self.counters = [PairCounter(self.experts) for _ in range(self.layers)]
        width, domains = model.config.width, max(len(split.domains), 1)
        per_expert = (self.layers, self.experts)
        self.pairs_LEE = np.zeros((*per_expert, self.experts), np.int64)
        self.domain_loads_LGE = np.zeros((self.layers, domains, self.experts), np.int64)
        self.sums_LED = np.zeros((*per_expert, width))
        self.sums = {name: np.zeros(per_expert) for name in ("gate", "score", "margin", "first")}

    def run(self) -> dict[str, Any]:
        """The whole pass; the facts of the manifest."""
        how, batches = self.how, traced_batches(self.split, self.how)
        with (
            (self.folder / "tokens.bin").open("wb") as tokens,
            (self.folder / "experts.bin").open("wb") as experts,
            (self.folder / "untrained.bin").open("wb") as untrained,
            (self.folder / "gates.bin").open("wb") as gates,
            tqdm(total=self.tokens, desc="tracing", unit="tok", unit_scale=True) as bar,
        ):
            files = {"experts": experts, "untrained": untrained, "gates": gates}
            for batch, positions_BT in giving_back(batches):
                counted_T = (batch.targets_BT != IGNORED).flatten()
                ids_T = batch.ids_BT.flatten()[counted_T].numpy()
                ids_T.astype(self.token_dtype).tofile(tokens)
                at_T = positions_BT.flatten()[counted_T].numpy() - 1
                self._add(self._forward(batch.to(how.device)), counted_T, ids_T, at_T, files)
                bar.update(len(ids_T))
        self._save()
        return {
            "tokens": self.tokens,
            "layers": self.layers,
            "experts": self.experts,
            "slots": self.slots_L,
            "top_k": self.top_k,
            "vocab_size": self.model.vocab_size,
            "token_dtype": self.token_dtype,
            "expert_dtype": self.expert_dtype,
            "domains": self.split.domains or ["text"],
        }

    def _forward(self, batch: Batch) -> list[Observed]:
        """What each routed layer was given and decided, and what its untrained twin would have."""
        seen: list[Observed] = []
        twins = dict(zip(self.model.routers(), self.untrained, strict=True))

        def observe(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
            x_TD, valid_T, ids_T, *_ = arguments
            untrained: Routing = twins[router](x_TD, valid_T, ids_T)
            seen.append(Observed(x_TD, routing, untrained.expert_ids_TK))

        handles = [router.register_forward_hook(observe) for router in twins]
        try:
            self.model.encode(batch.ids_BT, batch.document_ids_BT, batch.valid_BT, keep_scores=True)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _add(
        self,
        seen: list[Observed],
        counted_T: Tensor,
        ids_T: NDArray[np.int64],
        at_T: NDArray[np.int64],
        files: Mapping[str, IO[bytes]],
    ) -> None:
        """One batch into counts and files; `at_T` are the tokens' places in the stream."""
        owner_T = np.searchsorted(self.documents["start"], at_T, side="right") - 1
        domain_T = self.documents["domain"][owner_T].astype(np.int64)
        rows: dict[str, list[NDArray[Any]]] = {name: [] for name in files}
        for layer, found in enumerate(seen):
            counted = counted_T.to(found.x_TD.device)
            experts_TK = found.routing.expert_ids_TK[counted].cpu().numpy()
            gates_TK = found.routing.gates_TK[counted].double().cpu().numpy()
            self.counters[layer].add(ids_T, experts_TK)
            self._count(layer, experts_TK, domain_T)
            self._sum(layer, found, counted, experts_TK, gates_TK)
            rows["experts"].append(experts_TK.astype(self.expert_dtype))
            rows["untrained"].append(found.untrained_ids_TK[counted].cpu().numpy())
            rows["gates"].append((gates_TK.clip(0, 1) * GATE_STEPS).round().astype(np.uint16))
        rows["untrained"] = [ids_TK.astype(self.expert_dtype) for ids_TK in rows["untrained"]]
        for name, stream in files.items():
            np.stack(rows[name], 1).tofile(stream)

    def _count(
        self, layer: int, experts_TK: NDArray[np.int64], domain_T: NDArray[np.int64]
    ) -> None:
        experts = self.experts
        shape = self.domain_loads_LGE.shape[1:]
        keys = domain_T[:, None] * experts + experts_TK
        self.domain_loads_LGE[layer] += np.bincount(
            keys.ravel(), minlength=shape[0] * shape[1]
        ).reshape(shape)
        self.pairs_LEE[layer] += pair_counts(experts_TK, experts)

    def _sum(
        self,
        layer: int,
        found: Observed,
        counted: Tensor,
        experts_TK: NDArray[np.int64],
        gates_TK: NDArray[np.float64],
    ) -> None:
        """Per expert: vectors given, gates, scores, and the lead of the first choice."""
        assert found.routing.scores_TE is not None
        x_TD = found.x_TD[counted].float()
        ids_TK = found.routing.expert_ids_TK[counted]
        chosen_TE = x_TD.new_zeros(len(x_TD), self.experts).scatter_(1, ids_TK, 1.0)
        self.sums_LED[layer] += (chosen_TE.T @ x_TD).double().cpu().numpy()
        scores_TE = found.routing.scores_TE[counted]
        chosen_TK = scores_TE.gather(1, ids_TK).double().cpu().numpy()
        best_T2 = scores_TE.topk(min(2, scores_TE.shape[1]), 1).values.double().cpu().numpy()
        lead_T = best_T2[:, 0] - best_T2[:, -1]
        routes, first_T = experts_TK.ravel(), experts_TK[:, 0]
        for name, at, values in (
            ("gate", routes, gates_TK.ravel()),
            ("score", routes, chosen_TK.ravel()),
            ("margin", first_T, lead_T),
            ("first", first_T, np.ones(len(first_T))),
        ):
            self.sums[name][layer] += np.bincount(at, values, self.experts)

    def _save(self) -> None:
        arrays: dict[str, Any] = {}
        load_LE = self.pairs_LEE.diagonal(axis1=1, axis2=2)
        for layer, counter in enumerate(self.counters):
            for name, values in counter.counts()._asdict().items():
                arrays[f"tokens{layer}_{name}"] = values
        first_LE = self.sums.pop("first")
        for name, sums_LE in self.sums.items():
            counts_LE = first_LE if name == "margin" else load_LE
            arrays[f"{name}_LE"] = np.where(counts_LE > 0, sums_LE / counts_LE.clip(min=1), np.nan)
        np.savez(
            self.folder / "counts.npz",
            pairs_LEE=self.pairs_LEE,
            domain_loads_LGE=self.domain_loads_LGE,
            centroids_LED=(self.sums_LED / load_LE.clip(min=1)[..., None]).astype(np.float32),
            documents=self.documents[["start", "domain"]],
            **arrays,
        )


def _untrained_routers(
    model: LanguageModel, channel: MoEChannelConfig, top_k: int, device: torch.device
) -> list[nn.Module]:
    """Routers of the same kind with initial values of their own, one for each layer."""
    routers = []
    for layer, trained in enumerate(model.routers()):
        router = build_router(channel.router, model.config.width, trained.slots, top_k)
        initialise_router(router, UNTRAINED_SEED, f"layer{layer}")
        routers.append(router.to(device).eval())
    return routers
