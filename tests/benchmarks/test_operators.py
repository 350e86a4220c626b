"""The benchmarks of operators: every way is timed, and all compute the same."""

import pytest
import torch

from sra_ds.benchmarks import experts, linear, router
from sra_ds.ops.cosine_route import cosine_route_reference

NAMES = ("forward", "with backward")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    size = router.RouterSize(12, 8, 5, 2)
    monkeypatch.setattr(router, "ONE", {"cpu": [size]})
    monkeypatch.setattr(router, "GRID", [size, router.RouterSize(12, 8, 6, 1)])
    small = linear.LinearSize(20, 8, 12)
    monkeypatch.setattr(linear, "LAYERS", [small, linear.LinearSize(20, 12, 8)])
    monkeypatch.setattr(linear, "HEADS", [small])
    monkeypatch.setattr(experts, "SIZES", [experts.ExpertsSize(40, 48, 96, 4)])


@pytest.mark.parametrize(("grid", "sizes"), [(False, 1), (True, 2)])
def test_routing_is_timed_beside_the_chain(grid: bool, sizes: int) -> None:
    found = router.bench_router(1, grid)
    assert found.pop("kernels") and found.pop("threads or GPU")
    assert len(found) == sizes * 2 * 2
    for name, one in found.items():
        assert name.endswith(NAMES) and name.startswith("12 tokens 8 width")
        times = one["milliseconds"]
        assert set(times) == {"compiled", "reference", "chain"}
        assert one["chain_over_compiled"] == times["chain"] / times["compiled"]


def test_the_chain_routes_as_the_operator_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD, anchors_ED = (torch.randn(n, 8, generator=generator) for n in (12, 5))
    tau = torch.full((1,), 10.0)
    gates_TK, mean_probs_E = router._chain(x_TD, anchors_ED, tau, 2)
    routing, _ = cosine_route_reference(x_TD, anchors_ED, tau, 2, "all")
    torch.testing.assert_close(gates_TK, routing.gates_TK)
    torch.testing.assert_close(mean_probs_E, routing.mean_probs_E)


def test_layers_and_heads_are_timed_beside_torch() -> None:
    found = linear.bench_linear(1)
    assert found.pop("kernels") and found.pop("threads")
    assert len(found) == 3 and sum(name.endswith("head") for name in found) == 1
    for one in found.values():
        times = one["milliseconds"]
        assert one["torch_over_compiled"] == times["torch"] / times["compiled"]


def test_experts_are_timed_beside_a_ceiling() -> None:
    found = experts.bench_experts(1)
    assert found.pop("kernels") and found.pop("threads")
    assert len(found) == 2
    for one in found.values():
        times = one["milliseconds"]
        assert set(times) == {"compiled", "grouped", "loop", "autoep", "ceiling"}
        assert one["of_ceiling"]["ceiling"] == 1.0
        assert one["fullest_over_mean"] >= 1.0
        assert set(one["dispatch_and_combine"]) == {"compiled", "torch"}
