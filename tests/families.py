"""Each kind of language model in small: what a recipe's `model` has beside common sizes."""

from typing import Any

GELU = {"kind": "gelu", "hidden": 16, "dropout": 0.0}
SWIGLU = {"kind": "swiglu", "hidden": 16, "dropout": 0.0}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "expert": GELU}

RESONANCE = {"kind": "resonance", "heads": 2, "iterations": 3, "threshold": 0.5}

FAMILIES: dict[str, dict[str, Any]] = {
    "moe-cosine": {"channel": {**MOE, "router": {"kind": "cosine"}}},
    "moe-linear": {"channel": {**MOE, "router": {"kind": "linear", "bias": True}}},
    "moe-hash": {"channel": {**MOE, "router": {"kind": "hash"}}},
    "dense": {"channel": {"kind": "dense", "feed_forward": GELU}},
    "moe-swiglu-shared": {
        "channel": {
            **MOE,
            "expert": SWIGLU,
            "shared_expert": SWIGLU,
            "router": {"kind": "cosine", "temperature": "per_expert", "gate": "straight_through"},
        }
    },
    "resonance": {
        "embedding": {
            "kind": "prime_hilbert",
            "table_width": 24,
            "primes": [3, 5],
            "copies": 2,
            "dropout": 0.0,
        },
        "mixer": RESONANCE,
        "channel": {"kind": "prime_masked", "feed_forward": GELU, "primes": [3, 5]},
        "memory": {
            "kind": "static",
            "slots": 8,
            "best": 3,
            "key_width": 8,
            "value_width": 6,
            "rank": 3,
        },
        "head": {"kind": "pre_manifest", "chunk_tokens": 13, "candidates": 5},
    },
    "resonance-moe": {
        "mixer": {**RESONANCE, "halting": "hard"},
        "channel": {**MOE, "router": {"kind": "cosine"}},
        "memory": {"kind": "persistent", "heads": 2, "head_width": 8},
    },
    "resonance-blocks": {
        "mixer": {**RESONANCE, "rope_theta": None},
        "channel": {
            "kind": "prime_masked",
            "feed_forward": SWIGLU,
            "primes": [3, 5],
            "storage": "blocks",
        },
        "memory": {"kind": "fast", "heads": 2, "head_width": 8},
    },
    "moe-gnn": {
        "channel": {
            **MOE,
            "top_k": 3,
            "router": {"kind": "linear"},
            "coupling": {"kind": "gnn", "rank": 4},
        }
    },
    "moe-hgnn": {
        "channel": {
            **MOE,
            "top_k": 3,
            "compare_outputs": True,
            "coupling": {"kind": "hgnn", "rank": 4, "rounds": 2, "token_gate": True},
        }
    },
    "moe-learned-hyperedges": {
        "channel": {
            **MOE,
            "shared_expert": GELU,
            "coupling": {
                "kind": "hgnn",
                "rank": 4,
                "incidence": "learned",
                "hyperedges": 6,
                "members": 3,
            },
        }
    },
    "moe-block": {
        "channel": {
            **MOE,
            "top_k": 4,
            "expert_kind": "block",
            "expert_heads": 2,
            "compare_outputs": True,
            "coupling": {"kind": "gnn", "rank": 4},
        }
    },
    "moe-ghost": {
        "channel": {
            **MOE,
            "compare_outputs": True,
            "coupling": {"kind": "hgnn", "rank": 4},
            "ghosts": {"count": 1, "background": True},
        }
    },
    "spectral": {
        "embedding": {"kind": "spectral", "harmonics": 6, "dropout": 0.0},
        "mixer": {
            "kind": "wavelet",
            "form": "wave_conv",
            "families": ["db2"],
            "levels": 2,
            "filters": "learnable",
        },
        "channel": {"kind": "dense", "feed_forward": GELU},
    },
    "spectral-hybrid": {
        "embedding": {
            "kind": "hybrid",
            "harmonics": 6,
            "frequencies": "learnable",
            "coefficients": "polar",
            "ramp": 0.0,
            "dropout": 0.0,
        },
        "mixer": {"kind": "wavelet", "heads": 4, "families": ["haar"], "dropout": 0.0},
        "channel": {**MOE, "router": {"kind": "cosine"}},
    },
    "spectral-choice": {
        "embedding": {"kind": "token", "dropout": 0.0},
        "mixer": {"kind": "wavelet", "form": "wave_conv", "families": ["db2", "haar"], "levels": 2},
        "channel": {"kind": "dense", "feed_forward": GELU},
    },
    "spectral-controls": {
        "embedding": {"kind": "factorised", "rank": 12, "dropout": 0.0},
        "mixer": {"kind": "convolution", "taps": 8},
        "channel": {"kind": "dense", "feed_forward": GELU},
    },
}
ROUTED = [name for name, model in FAMILIES.items() if model["channel"]["kind"] == "moe"]
CLOSED = [
    name
    for name in ROUTED
    if not {"coupling", "compare_outputs", "ghosts"} & set(FAMILIES[name]["channel"])
]
"""Those whose experts may be spread over processes."""
