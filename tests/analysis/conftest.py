"""Saved runs of tiny models, and what most tests of analysis need."""

from saved_runs import call, corpus, make_run

__all__ = ["call", "corpus", "make_run"]
