"""The whole path of one run, composed from the parts: resolve -> prepare -> train -> report.

This is what `launch/train.py` calls. Training knows nothing of evaluation; it is handed over here.
"""

from sra_ds.training.processes import finish_processes
from sra_ds.workflow.resolve import Resolved, dry_run, resolve
from sra_ds.workflow.train import train

__all__ = ["Resolved", "dry_run", "finish_processes", "resolve", "train"]
