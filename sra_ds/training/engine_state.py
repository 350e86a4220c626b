"""The weights and optimizer state this process holds, at any ZeRO stage, as fragments of whole tensors.

    stage 0     each parameter is stepped itself
    stage 1, 2  a float32 partition per parameter group; `_hp_mapping` says where a parameter lies in it
    stage 3     a float32 partition per sub-group; `grad_position` says so

Weights are the float32 master copies where there are any, so that nothing is lost at bf16. The attributes
read here are those of DeepSpeed 0.19.8; `tests/training/test_engine_state.py` fails if they change.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sra_ds.storage.fragments import Fragment, Range, TensorFiles, whole_tensor
from sra_ds.storage.held import held_ranges

START = "start"
"""`<parameter>/start` among the optimizer's state is where a parameter was when the run began: not the
optimizer's, but kept beside it for who measures how far it moved."""


class EngineState(NamedTuple):
    """What one process writes: weights and buffers by name, optimizer tensors by `name/state`."""

    weights: dict[str, Fragment]
    optimizer: dict[str, Fragment]


class Piece(NamedTuple):
    """Elements of a parameter as the optimizer sees them: `size` elements at `offset` of the flat tensor
    it steps, which are those from `start` on of the parameter held here."""

    flat: Tensor
    offset: int
    size: int
    start: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor like `flat`."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.size]

    def resembles(self, state: Tensor) -> bool:
        """Whether the optimizer keeps an element of this state for each of `flat`."""
        return state.dim() > 0 and state.numel() == self.flat.numel()


def engine_state(engine: Any) -> EngineState:
    """Everything a checkpoint needs from this process; each element is given by one process only."""
    first = engine.global_rank == 0
    ranges = held_ranges(engine.module)
    buffers = {n: b for n, b in engine.module.named_buffers() if first and n in ranges}
    weights = {name: whole_tensor(buffer) for name, buffer in buffers.items()}
    optimizer: dict[str, Fragment] = {}
    for name, parameter in engine.module.named_parameters():
        if _replicated(engine, parameter) and engine.global_rank >= ranges[name].parts:
            continue  # the first processes hold the same and write it
        for piece in _pieces(engine, parameter):
            start = ranges[name].start + piece.start
            part = Range(ranges[name].shape, start, start + piece.size)
            weights[name] = Fragment(part, piece.of(piece.flat))
            for key, value in _torch_optimizer(engine).state.get(piece.flat, {}).items():
                if value is not None:
                    optimizer[f"{name}/{key}"] = (
                        Fragment(part, piece.of(value))
                        if piece.resembles(value)
                        else whole_tensor(value.clone())
                    )
    return EngineState(weights, optimizer)


def restore_engine(engine: Any, weights: TensorFiles, optimizer: TensorFiles) -> None:
    """Set master weights and optimizer state from files of any layout; the model already has its weights,
    from which the engine was built. Raises `CheckpointError` for missing elements."""
    torch_optimizer = _torch_optimizer(engine)
    keys: dict[str, list[str]] = {}
    for path in optimizer.names:
        name, key = path.rsplit("/", 1)
        if key != START:
            keys.setdefault(name, []).append(key)
    ranges = held_ranges(engine.module)
    for name, parameter in engine.module.named_parameters():
        for piece in _pieces(engine, parameter):
            start = ranges[name].start + piece.start
            weights.read_into(name, start, piece.of(piece.flat))
            state = torch_optimizer.state[piece.flat]
            for key in keys.get(name, []):
                path = f"{name}/{key}"
                if optimizer.shape(path) != ranges[name].shape:
                    state[key] = optimizer.read(path).to(_step_device(torch_optimizer, piece.flat))
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(piece.flat)
                optimizer.read_into(path, start, piece.of(state[key]))


def forget_rows(engine: Any, parameter: nn.Parameter, rows: Sequence[int]) -> None:
    """Zero what the optimizer remembers of some rows of a matrix, at any stage: moments of values that
    are no longer there. Each process clears the part it holds."""
    width = tuple(getattr(parameter, "ds_shape", parameter.shape))[-1]
    for piece in _pieces(engine, parameter):
        for state in _torch_optimizer(engine).state.get(piece.flat, {}).values():
            if state is not None and piece.resembles(state):
                held = piece.of(state)
                for row in rows:
                    first = row * width - piece.start
                    held[max(0, first) : max(0, first + width)].zero_()


def forget(engine: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Zero everything the optimizer remembers of these parameters, at any stage, and the count of their
    steps: they share it with no others. Each process clears the part it holds. DeepSpeed's `safe_set`
    functions reach moments, but not that count."""
    for parameter in parameters:
        for piece in _pieces(engine, parameter):
            for state in _torch_optimizer(engine).state.get(piece.flat, {}).values():
                if state is not None:
                    (piece.of(state) if piece.resembles(state) else state).zero_()


def _replicated(engine: Any, parameter: nn.Parameter) -> bool:
    """Whether each process has all of a parameter, and no optimizer keeps another copy of it."""
    stage: int = engine.zero_optimization_stage()
    return stage == 0 or (stage < 3 and not parameter.requires_grad)


def _pieces(engine: Any, parameter: nn.Parameter) -> Iterator[Piece]:
    """Where the optimizer keeps a parameter, or where it lies if it is frozen; nothing if this process
    steps none of it."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if _replicated(engine, parameter):
        yield Piece(parameter, 0, parameter.numel(), 0)
    elif stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            at, local = mapping.hp_fragment_address, mapping.lp_fragment_address
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Piece(flat, at.start, at.numel, local.start)
    else:
        if parameter.requires_grad:
            group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
        else:
            flat = parameter.ds_tensor  # type: ignore[attr-defined]
            offset, share = 0, flat.numel()
        start = share * parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
        count = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:  # the last shares are padding
            yield Piece(flat, offset, count, start)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _step_device(optimizer: torch.optim.Optimizer, flat: Tensor) -> torch.device:
    """torch keeps the step count of a fused optimizer beside its parameters, else on the CPU."""
    return flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
