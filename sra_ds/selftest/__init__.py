"""What a user runs on a new machine or cluster: does every layout train the same model here?"""

from sra_ds.selftest.killed import kill_and_resume
from sra_ds.selftest.layouts import compare_layouts

__all__ = ["compare_layouts", "kill_and_resume"]
