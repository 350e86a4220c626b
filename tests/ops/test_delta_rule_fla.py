"""How tokens are packed for flash-linear-attention's kernel; a stand-in computes what it does."""

import itertools

import pytest
import torch
from torch import Tensor

from sra_ds.errors import BackendUnavailable
from sra_ds.ops import delta_rule_fla as module
from sra_ds.ops.delta_rule import delta_rule_reference
from sra_ds.ops.delta_rule_fla import delta_rule_fla

ROWS, LENGTH, HEADS, KEYS, VALUES = 3, 11, 2, 4, 5


def stand_in(q, k, v, *, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """Its semantics on one packed batch: S = exp(g) S; S += beta k (v - k S); o = scale q S."""
    assert len(q) == 1 and output_final_state and initial_state.is_contiguous()
    outputs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        assert begin < end
        S_HCV = initial_state[n]
        for t in range(begin, end):
            S_HCV = g[0, t].exp()[:, None, None] * S_HCV
            missing_HV = v[0, t] - torch.einsum("hc,hcv->hv", k[0, t], S_HCV)
            S_HCV = S_HCV + torch.einsum("h,hc,hv->hcv", beta[0, t], k[0, t], missing_HV)
            outputs.append(scale * torch.einsum("hc,hcv->hv", q[0, t], S_HCV))
        states.append(S_HCV)
    return torch.stack(outputs)[None], torch.stack(states)


def inputs() -> list[Tensor]:
    q, k = torch.randn(2, ROWS, LENGTH, HEADS, KEYS, dtype=torch.float64)
    v = torch.randn(ROWS, LENGTH, HEADS, VALUES, dtype=torch.float64)
    beta = torch.rand(ROWS, LENGTH, HEADS, dtype=torch.float64)
    return [q, k / k.norm(dim=-1, keepdim=True), v, beta, torch.tensor([0.9, 0.6]).double()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_packed_and_unpacked_it_is_the_delta_rule(
    monkeypatch, padded: bool, stateful: bool
) -> None:
    monkeypatch.setattr(module, "fused_kernel", lambda: stand_in)
    starts_BT = torch.rand(ROWS, LENGTH) < 0.3
    starts_BT[1, 0] = False
    valid_BT = torch.rand(ROWS, LENGTH) < 0.6 if padded else None
    if valid_BT is not None:
        valid_BT[2] = False  # a row of padding alone
    state = torch.randn(ROWS, HEADS, VALUES, KEYS).double() if stateful else None
    start = torch.randn(HEADS, VALUES, KEYS).double() if stateful else None
    arguments = (*inputs(), starts_BT, valid_BT, state, start)
    found, expected = delta_rule_fla(*arguments), delta_rule_reference(*arguments)
    real_BT = torch.ones_like(starts_BT) if valid_BT is None else valid_BT
    near = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.y_BTHV[real_BT], expected.y_BTHV[real_BT], **near)
    torch.testing.assert_close(found.state_BHVC, expected.state_BHVC, **near)


@pytest.mark.parametrize("stateful", [False, True])
def test_padding_alone_changes_nothing(monkeypatch, stateful: bool) -> None:
    monkeypatch.setattr(module, "fused_kernel", lambda: stand_in)
    state = torch.randn(ROWS, HEADS, VALUES, KEYS).double() if stateful else None
    nowhere_BT = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    found = delta_rule_fla(*inputs(), ~nowhere_BT, nowhere_BT, state)
    expected = torch.zeros(ROWS, HEADS, VALUES, KEYS).double() if state is None else state
    assert torch.equal(found.state_BHVC, expected) and (found.y_BTHV == 0).all()


def test_without_the_library_it_says_what_to_install() -> None:
    try:
        import fla.ops.gated_delta_rule  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailable, match="pip install flash-linear-attention"):
            delta_rule_fla(*inputs(), torch.zeros(ROWS, LENGTH, dtype=torch.bool))
    else:
        pytest.skip("flash-linear-attention is installed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_itself_on_a_gpu() -> None:
    pytest.importorskip("fla.ops.gated_delta_rule")
    shapes = [(ROWS, 130, HEADS, 32)] * 3
    q, k, v = (torch.randn(shape, device="cuda") for shape in shapes)
    k = k / k.norm(dim=-1, keepdim=True)
    beta = torch.rand(ROWS, 130, HEADS, device="cuda")
    starts_BT = torch.rand(ROWS, 130, device="cuda") < 0.05
    arguments = (q, k, v, beta, torch.tensor([0.9, 0.99], device="cuda"), starts_BT)
    expected = delta_rule_reference(
        *(x.double() if x.is_floating_point() else x for x in arguments)
    )
    found = delta_rule_fla(*(x.bfloat16() if x.is_floating_point() else x for x in arguments))
    torch.testing.assert_close(found.y_BTHV.double(), expected.y_BTHV, rtol=0.05, atol=0.05)
