"""GPUs and networks: numbers of data sheets, and what has to be assumed. Nothing here was measured.

Where a data sheet gives bandwidth of both directions together, half of it is used. Sizes are decimal: a
card sold with 80 GB holds a little more than 80e9 bytes.
"""

import re
from typing import NamedTuple

from sra_ds.errors import ConfigError

GB = 10**9
RUNTIME_BYTES = 1.5e9
"""Assumed for the CUDA context, libraries and communication buffers."""
USABLE = 0.9
"""Assumed share of a memory that can be used: of a card's because of the allocator's fragments, of a
host's because of the system, libraries and data loading."""
EFFICIENCY = 0.35
"""Assumed share of the data sheet's FLOP/s a whole step reaches; a large product alone reaches 0.8."""
INTER_NODE = 50e9
"""Assumed bytes per second and GPU between nodes, each direction: one 400 Gb/s port per GPU."""
LATENCY = 10e-6
"""Assumed seconds per hop of a collective; n processes are log2(n) hops apart."""
PCIE = 25e9
"""Assumed bytes per second between a GPU and its host, each direction: PCIe 4.0 x16."""
HOST_BANDWIDTH = 200e9
"""Assumed bytes per second of a host's memory, shared by its GPUs."""
HOST_MEMORY = 256e9
"""Assumed bytes of a host's memory per GPU: 2 TB for a node of eight."""
LAUNCH = 5e-6
"""Assumed seconds the host needs to start one kernel."""
UNITS = {"GB": 1e9, "GIB": 2**30, "TB": 1e12}


class Gpu(NamedTuple):
    """FLOP/s are dense; bandwidths in bytes per second, `link` to another GPU of the node in each
    direction; `source` names the data sheet."""

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    source: str

    def flops(self, width: int) -> float:
        """Peak for numbers of `width` bytes."""
        return self.bf16 if width == 2 else self.fp32

    def compute_bound_rows(self, width: int) -> float:
        """Rows an expert needs for its product to take longer than reading its weights.

        R rows times a matrix of W numbers are 2 R W operations on W `width` bytes that have to be read:
        2 R W / peak >= W width / bandwidth, so R >= peak x width / (2 bandwidth).
        """
        return self.flops(width) * width / (2 * self.bandwidth)

    def usable(self, memory: float) -> float:
        """Bytes a training step may use of a card with so much memory."""
        return memory * USABLE - RUNTIME_BYTES


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3090", 24e9, 71e12, 35.6e12, 936e9, 32e9, "NVIDIA GA102 whitepaper; PCIe 4.0 x16"),
        Gpu("RTX 4090", 24e9, 165e12, 82.6e12, 1008e9, 32e9, "NVIDIA Ada whitepaper; PCIe 4.0 x16"),
        Gpu("A100 40GB", 40e9, 312e12, 19.5e12, 1555e9, 300e9, "NVIDIA A100 SXM data sheet"),
        Gpu("A100 80GB", 80e9, 312e12, 19.5e12, 2039e9, 300e9, "NVIDIA A100 SXM data sheet"),
        Gpu("H100", 80e9, 989e12, 67e12, 3350e9, 450e9, "NVIDIA H100 SXM data sheet"),
        Gpu("H200", 141e9, 989e12, 67e12, 4800e9, 450e9, "NVIDIA H200 SXM data sheet"),
    )
}
CARDS = (24e9, 40e9, 80e9, 141e9)
"""Memory sizes every plan is held against."""
SMALLEST = 24e9
"""Planned with when neither a GPU nor a memory size is named."""
LARGEST_CLUSTER = 100_000
"""GPUs up to which plans are made."""
USUAL = {24e9: "RTX 4090", 40e9: "A100 40GB", 80e9: "H100", 141e9: "H200"}
"""The GPU a memory size stands for when none is named."""


class Network(NamedTuple):
    """Nodes and their GPUs; bytes per second and GPU in each direction within and between nodes."""

    nodes: int
    gpus_per_node: int
    intra: float
    inter: float


def parse_memory(text: str, option: str = "--gpu-memory") -> float:
    """ "24GB" -> 24e9; raises `ConfigError` that names the option for a size without unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|TB)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{option} {text}: expected a size with its unit, such as 24GB")
    size = float(found[1]) * UNITS[found[2].upper()]
    if size <= 0:
        raise ConfigError(f"{option} {text}: must be more than 0")
    return size


def choose_gpu(name: str | None, memory: float | None) -> tuple[Gpu, float]:
    """A GPU and the memory to plan with: the named GPU, with its own memory unless another is given; or
    the usual one with the largest memory that is not above `memory`."""
    if name is not None:
        if name not in GPUS:
            raise ConfigError(f"--gpu {name}: known are {', '.join(GPUS)}")
        return GPUS[name], GPUS[name].memory if memory is None else memory
    memory = SMALLEST if memory is None else memory
    sizes = [size for size in USUAL if size <= memory] or [min(USUAL)]
    return GPUS[USUAL[max(sizes)]], memory


def make_network(
    gpus: int, nodes: int, gpu: Gpu, intra: float | None, inter: float | None
) -> Network:
    """Raises `ConfigError` unless the GPUs divide over the nodes. Bandwidths: GB/s, one direction."""
    if gpus > LARGEST_CLUSTER:
        raise ConfigError(f"--gpus {gpus}: plans are made for at most {LARGEST_CLUSTER:,}")
    if gpus % nodes:
        raise ConfigError(f"--gpus {gpus} is not a multiple of --nodes {nodes}")
    within = gpu.link if intra is None else intra * GB
    return Network(nodes, gpus // nodes, within, INTER_NODE if inter is None else inter * GB)
