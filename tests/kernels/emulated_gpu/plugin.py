"""pytest plugin: the operators run on the emulated GPU, the library $EMULATED_GPU."""

import os
from pathlib import Path

from sra_ds.ops import cosine_route, extension

extension._library = lambda capabilities: (Path(os.environ["EMULATED_GPU"]), "emulated")
cosine_route.FUSED_DEVICES = ("cpu",)
