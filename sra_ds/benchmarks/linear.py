"""Linear layers and the head's loss, compiled against torch, in turn in one process."""

from typing import Any, NamedTuple

import torch

from sra_ds.benchmarks.operators import keep_compiled_products, label
from sra_ds.heap import keep_freed_memory
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.ops.linear import linear
from sra_ds.ops.linear_cross_entropy import linear_cross_entropy
from sra_ds.timing import Work, in_turn, medians


class LinearSize(NamedTuple):
    """N rows from width I to O."""

    rows: int
    inputs: int
    outputs: int


LAYERS = [LinearSize(8192, 256, 768), LinearSize(8192, 512, 2048), LinearSize(8192, 2048, 512)]
HEADS = [LinearSize(8192, 256, 8192), LinearSize(8192, 512, 32000)]
CHUNK_TOKENS = 2048


def bench_linear(rounds: int) -> dict[str, Any]:
    """Forward with backward, float32."""
    keep_compiled_products()
    keep_freed_memory()
    results: dict[str, Any] = {"kernels": extension().reason, "threads": torch.get_num_threads()}
    for made, what, sizes in ((_layer, "layer", LAYERS), (_head, "head", HEADS)):
        for size in sizes:
            run = made(size)
            found = medians(in_turn({"compiled": run, "torch": _with_torch(run)}, rounds))
            results[label(size, torch.float32, what)] = {
                "milliseconds": found,
                "torch_over_compiled": found["torch"] / found["compiled"],
            }
    return results


def _with_torch(run: Work) -> Work:
    def same() -> None:
        with use_kernels("reference"):
            run()

    return same


def _layer(size: LinearSize) -> Work:
    x_NI = torch.randn(size.rows, size.inputs, requires_grad=True)
    weight_OI = torch.randn(size.outputs, size.inputs, requires_grad=True)
    upstream_NO = torch.randn(size.rows, size.outputs)

    def run() -> None:
        linear(x_NI, weight_OI).backward(upstream_NO)
        x_NI.grad = weight_OI.grad = None

    return run


def _head(size: LinearSize) -> Work:
    h_ND = torch.randn(size.rows, size.inputs, requires_grad=True)
    weight_VD = (0.02 * torch.randn(size.outputs, size.inputs)).requires_grad_()
    targets_N = torch.randint(size.outputs, (size.rows,))

    def run() -> None:
        linear_cross_entropy(h_ND, weight_VD, targets_N, CHUNK_TOKENS)[0].backward()
        h_ND.grad = weight_VD.grad = None

    return run
