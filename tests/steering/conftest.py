"""Saved runs of tiny models, and the tool in this process."""

from saved_runs import call, corpus, make_run

__all__ = ["call", "corpus", "make_run"]
