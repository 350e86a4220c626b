"""What `tools/bench.py` measures: ratios within one process or one run, never times of their own.

operators  router, experts        compiled operators beside other ways to compute the same
parts      parts                  mixers and channels beside the plain ones they stand for
steps      step, memory, backends, scaling    training steps of whole recipes
words      latency                what a person waits for
"""
