"""Saved runs (`saved_runs.py`), and what the Transformers library needs to know before it is imported."""

import os
import tempfile

from saved_runs import call, corpus, make_run

__all__ = ["call", "corpus", "make_run"]

MODULES = tempfile.TemporaryDirectory(prefix="hf-modules-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both are read when transformers is imported
os.environ.setdefault("HF_MODULES_CACHE", MODULES.name)
