"""What `tools/bench.py` measures: ratios within one process or one run, never times of their own.

operators: router, experts, linear, compiled beside other ways to compute the same; parts: mixers and
channels beside the plain ones they stand for; whole steps of recipes: step, memory, backends, scaling;
what a person waits for: latency.
"""
