"""Experts changed on purpose: which to change, what it does, what it costs. The changing itself is
`inference.steer`; what experts do by themselves is `analysis`."""
