"""The benchmark of parts: every variant is there and computes what it should, on a tiny batch."""

import pytest
import torch

from sra_ds.benchmarks import latency, parts
from sra_ds.benchmarks.parts import batch_context, bench_parts, mixers


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "WINDOWS", 2)
    monkeypatch.setattr(parts, "LENGTH", 20)
    monkeypatch.setattr(parts, "MIXER_WIDTH", 16)
    monkeypatch.setattr(parts, "CHANNEL_WIDTHS", ((24, 48),))
    monkeypatch.setattr(parts, "LONG", ((1, 60),))


@pytest.mark.parametrize(
    ("what", "plain", "others"),
    [
        ("mixer", "attention", {"soft", "hard, all go on", "hard, all stop"}),
        ("bands", "attention", {"wave_conv", "wave_attn", "convolution"}),
        ("channel", "dense", {"masked", "blocks"}),
    ],
)
def test_every_variant_is_timed_beside_the_plain_one(what, plain, others) -> None:
    (found,) = bench_parts(what, 1).values()
    for direction in ("forward", "with backward"):
        times, ratios = found[direction]["milliseconds"], found[direction][f"over_{plain}"]
        assert set(times) == {plain, *others}
        for name in times:
            assert ratios[name] == pytest.approx(times[name] / times[plain])


def test_the_rules_of_the_mixers_do_what_their_names_say() -> None:
    parts, context = mixers(), batch_context()
    for name, iterations in (("hard, all go on", 3), ("hard, all stop", 1)):
        mixer = parts[name]
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        counts = mixer(torch.randn(2, 20, 16), context)[1]["halting"].iterations_BT
        assert (counts == iterations).all()


def test_latency_is_told_for_each_recipe(tiny_recipe) -> None:
    names = ("dense", "spectral-hybrid")
    found = latency.bench_latency([tiny_recipe(name) for name in names], 1)
    assert set(found) == set(names)
    for own in found.values():
        assert 0 < own["each_token"] <= own["slowest_tenth"]
        assert own["first_token"] > 0
