"""Generators of random numbers, one for each thing that is drawn, so that none depends on another."""

import hashlib

import torch


def generator(seed: int, *path: object) -> torch.Generator:
    """A CPU generator for one thing, seeded by the hash of (seed, path)."""
    text = "/".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
