"""Wavelet mixers: the transform against its definition and PyWavelets, bands, keys, learned filters."""

from typing import Any

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from references import assert_near, randomise
from sra_ds.config.model import WaveAttentionConfig, WaveConvConfig
from sra_ds.config.model.mixers import TAPS
from sra_ds.model.context import Context, document_positions, visible_positions
from sra_ds.model.init import initialise
from sra_ds.model.mixers.bands import decompose, split_bands
from sra_ds.model.mixers.filters import LowPass, orthogonality_error, wavelet_taps
from sra_ds.model.mixers.wave_attention import WaveAttention, keep_every, stride
from sra_ds.model.mixers.wave_conv import WaveConv
from sra_ds.training.controllers.schedules import ChoiceTemperature

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTH = 16
FAMILIES = sorted(TAPS)


def room(windows: int, length: int) -> Tensor:
    return torch.arange(length).expand(windows, -1)


def context_of(documents_BT: Tensor, valid_BT: Tensor | None = None) -> Context:
    length = documents_BT.shape[1]
    visible = visible_positions(documents_BT, valid_BT, length, length, documents_BT.device)
    every = torch.ones_like(documents_BT, dtype=torch.bool) if valid_BT is None else valid_BT
    positions_BT = document_positions(documents_BT, every)
    return Context(documents_BT, torch.arange(length), positions_BT, valid_BT, visible)


def started(mixer: torch.nn.Module) -> Any:
    holder = torch.nn.Module()
    holder.blocks = torch.nn.ModuleList([mixer])
    initialise(holder, 0)
    return mixer.double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_those_of_the_family_and_sum_to_one(family: str) -> None:
    taps_K = wavelet_taps(family)
    assert len(taps_K) == TAPS[family]
    assert_near(taps_K.sum(), torch.tensor(1.0, dtype=torch.float64), 1e-12)
    assert_near(taps_K * np.sqrt(2), torch.tensor(pywt.Wavelet(family).dec_lo).double(), 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_dmey_is_not_quite_orthogonal(family: str) -> None:
    error = float(orthogonality_error(wavelet_taps(family)))
    if family == "dmey":  # the truncation of a filter without end
        assert 1e-8 < error < 1e-2
    else:
        assert error < 1e-12
    assert float(orthogonality_error(torch.full((8,), 1 / 8, dtype=torch.float64))) > 0.1


@pytest.mark.parametrize("length", [1, 2, 7, 63, 130])
@pytest.mark.parametrize("family", FAMILIES)
def test_bands_add_up_to_the_input_also_below_the_receptive_field(family: str, length: int) -> None:
    x_BTD = torch.randn(2, length, 3, dtype=torch.float64)
    bands = decompose(x_BTD, wavelet_taps(family), 3, room(2, length))
    assert len(bands) == 4
    assert (sum(bands) - x_BTD).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["haar", "db2", "db4", "sym4", "coif1"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_approximations_are_those_of_pywt_swt_away_from_the_edges(family: str, level: int) -> None:
    """PyWavelets wraps around, is centred otherwise and scales by sqrt(2) at each level."""
    length = 256
    x_T = torch.randn(length, dtype=torch.float64)
    bands = decompose(x_T[None, :, None], wavelet_taps(family), level, room(1, length))
    mine = bands[-1][0, :, 0].numpy()
    theirs = pywt.swt(x_T.numpy(), family, level)[0][0] / np.sqrt(2) ** level
    reach = (TAPS[family] - 1) * (2**level - 1)
    shift = (TAPS[family] // 2) * (2**level - 1)
    assert np.abs(mine[reach + shift :] - theirs[reach : length - shift]).max() < 1e-12


def test_approximation_is_the_nested_definition() -> None:
    x_BTD, h = torch.randn(2, 40, 3, dtype=torch.float64), wavelet_taps("db2")
    room_BT = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    current = x_BTD
    expected = []
    for level in range(3):
        coarser = torch.zeros_like(current)
        for t in range(40):
            for k, tap in enumerate(h):
                lag = k * 2**level
                if lag <= room_BT[0, t]:
                    coarser[:, t] += tap * current[:, t - lag]
        expected.append(current - coarser)
        current = coarser
    for mine, theirs in zip(decompose(x_BTD, h, 3, room_BT), [*expected, current], strict=True):
        assert_near(mine, theirs, 1e-12)


@pytest.mark.parametrize(("levels", "family"), [(1, "haar"), (3, "db4"), (2, "db2")])
def test_the_receptive_field_is_what_the_config_says(levels: int, family: str) -> None:
    config = WaveConvConfig(families=(family,), levels=levels)
    field, length = config.receptive_field, config.receptive_field + 20
    x_BTD = torch.randn(1, length, 1, dtype=torch.float64, requires_grad=True)
    approximation = decompose(x_BTD, wavelet_taps(family), levels, room(1, length))[-1]
    (gradient,) = torch.autograd.grad(approximation[0, -1, 0], x_BTD)
    reached = gradient[0, :, 0].nonzero().flatten()
    assert int(reached.min()) == length - field and int(reached.max()) == length - 1


def test_split_bands_gives_each_group_its_own_band() -> None:
    x_BTD, room_BT = torch.randn(2, 30, 8, dtype=torch.float64), room(2, 30)
    taps_K = wavelet_taps("db2")
    bands = decompose(x_BTD, taps_K, 3, room_BT)
    for number, part in enumerate(split_bands(x_BTD, taps_K, 3, room_BT)):
        group = slice(2 * number, 2 * number + 2)
        assert_near(part, bands[number][..., group], 1e-12)


def test_wave_conv_is_its_equation() -> None:
    mixer = randomise(WaveConv(WaveConvConfig(families=("db2",), levels=2), WIDTH)).double()
    mixer.low_pass.taps_FK[0] = wavelet_taps("db2")
    x_BTD, context = torch.randn(2, 20, WIDTH, dtype=torch.float64), context_of(torch.zeros(2, 20))
    gates = torch.sigmoid(x_BTD @ mixer.gates.weight.T + mixer.gates.bias).chunk(3, -1)
    bands = decompose(x_BTD, wavelet_taps("db2"), 2, room(2, 20))
    mixed = sum(gate * band for gate, band in zip(gates, bands, strict=True))
    expected = mixed @ mixer.out.weight.T + mixer.out.bias
    assert_near(mixer(x_BTD, context)[0], expected, 1e-12)


def test_gates_start_at_one_over_the_number_of_bands() -> None:
    mixer = started(WaveConv(WaveConvConfig(), WIDTH))
    facts = mixer(torch.zeros(1, 60, WIDTH).double(), context_of(torch.zeros(1, 60)))[1]
    assert [float(facts[f"gate_{band}"]) for band in ("d1", "d2", "d3", "a3")] == [
        pytest.approx(0.25)
    ] * 4


@pytest.mark.parametrize("documents", [False, True])
def test_wave_attention_is_its_definition(documents: bool) -> None:
    """Head by head and query by query."""
    config = WaveAttentionConfig(
        heads=4, levels=3, families=("haar",), dropout=0.0, rope_theta=100.0
    )
    mixer = randomise(WaveAttention(config, WIDTH)).double().eval()
    mixer.low_pass.taps_FK[0] = wavelet_taps("haar")
    doc_BT = torch.zeros(2, 21, dtype=torch.int64)
    if documents:
        doc_BT = (torch.rand(2, 21) < 0.2).cumsum(-1)
    context = context_of(doc_BT)
    if not documents:
        context = context._replace(visible_B1TS=None)
    x_BTD = torch.randn(2, 21, WIDTH, dtype=torch.float64)
    q, k, v = (x_BTD @ mixer.qkv.weight.T + mixer.qkv.bias).chunk(3, -1)
    room_BT = context.document_positions_BT
    gates_BTJ = 4 * torch.softmax(x_BTD @ mixer.band_gates.weight.T + mixer.band_gates.bias, -1)
    parts = []
    for band, step in enumerate((1, 4, 8, 8)):
        own = slice(4 * band, 4 * band + 4)
        k_b, v_b = (decompose(z, wavelet_taps("haar"), 3, room_BT)[band][..., own] for z in (k, v))
        parts.append(
            _attended(q[..., own], k_b, v_b, doc_BT, room_BT, step) * gates_BTJ[..., [band]]
        )
    expected = torch.cat(parts, -1) @ mixer.out.weight.T + mixer.out.bias
    assert_near(mixer(x_BTD, context)[0], expected, 1e-10)


def _attended(q, k, v, doc_BT, room_BT, step) -> Tensor:
    """One head of 4 channels over the keys of one document at multiples of `step`."""
    angles_TC = (
        torch.arange(q.shape[1])[:, None] * 100.0 ** (-torch.tensor([0.0, 2.0]) / 4).double()
    )

    def turned(z):
        first, second = z.chunk(2, -1)
        cos, sin = angles_TC.cos(), angles_TC.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = turned(q), turned(k)
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for t in range(q.shape[1]):
            seen = [
                s
                for s in range(t + 1)
                if doc_BT[b, s] == doc_BT[b, t] and room_BT[b, s] % step == 0
            ]
            weights = torch.softmax(k[b, seen] @ q[b, t] / 2, 0)
            out[b, t] = weights @ v[b, seen]
    return out


def test_coarse_bands_keep_fewer_keys() -> None:
    assert [stride(band, 3) for band in range(4)] == [1, 4, 8, 8]
    assert [stride(band, 1) for band in range(2)] == [1, 2]
    keys = torch.randn(2, 1, 32, 4)
    doc_BT = (torch.arange(32) >= 13).long().expand(2, 32)
    context = context_of(doc_BT)
    kept = keep_every(8, keys, keys, context.document_positions_BT, context)
    assert kept.k_BGMC.shape[2] == 2 + 3  # 0, 8 of the first and 0, 8, 16 of the second
    assert torch.equal(kept.k_BGMC[0, 0, :2], keys[0, 0, [0, 8]])
    assert torch.equal(kept.k_BGMC[0, 0, 2:], keys[0, 0, [13, 21, 29]])


def test_padding_that_sees_no_key_is_finite() -> None:
    config = WaveAttentionConfig(heads=4, families=("haar",), dropout=0.0)
    mixer = started(WaveAttention(config, WIDTH))
    valid_BT = torch.ones(1, 12, dtype=torch.bool)
    valid_BT[:, 9:] = False
    doc_BT = torch.zeros(1, 12, dtype=torch.int64)
    doc_BT[:, 9:] = torch.arange(1, 4)
    x_BTD = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    assert mixer(x_BTD, context_of(doc_BT, valid_BT))[0].isfinite().all()


def test_decoding_keeps_what_the_filters_still_need_and_no_more() -> None:
    mixer = started(WaveConv(WaveConvConfig(), WIDTH))
    cache: dict[str, Tensor] = {}
    x_BTD = torch.randn(1, 70, WIDTH, dtype=torch.float64)
    whole = mixer(x_BTD, context_of(torch.zeros(1, 70, dtype=torch.int64)))[0]
    for at in range(70):
        step = context_of(torch.zeros(1, at + 1, dtype=torch.int64))
        step = step._replace(document_positions_BT=step.document_positions_BT[:, at:])
        found = mixer(x_BTD[:, at : at + 1], step, cache)[0]
        assert_near(found, whole[:, at : at + 1], 1e-12)
    kept = {name: value.shape[1] for name, value in cache.items()}
    assert kept == {"level0": 7, "level1": 14, "level2": 28}


def low_pass(**settings: Any) -> LowPass:
    module = LowPass(WaveConvConfig(**settings))
    holder = torch.nn.Module()
    holder.blocks = torch.nn.ModuleList([module])
    initialise(holder, 0)
    return module


def test_learned_taps_always_sum_to_one() -> None:
    module = low_pass(filters="learnable")
    assert_near(module()[0], wavelet_taps("db4").float(), 1e-6)
    with torch.no_grad():
        module.learned_K.normal_()
    taps_K, facts = module()
    assert float(taps_K.sum().detach()) == pytest.approx(1, abs=1e-6)
    assert float(facts["filter_drift"]) > 1


def test_the_penalty_pulls_taps_back_to_orthogonality() -> None:
    module = low_pass(filters="learnable")
    with torch.no_grad():
        module.learned_K.add_(0.05 * torch.randn(8))
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    first = float(orthogonality_error(module()[0]).detach())
    for _ in range(400):
        optimizer.zero_grad()
        orthogonality_error(module()[0]).backward()
        optimizer.step()
    assert float(orthogonality_error(module()[0]).detach()) < 1e-3 * first


def test_the_temperature_of_the_choice_never_rises_again() -> None:
    module = low_pass(families=("db4", "haar"), choice_temperature=(2.0, 0.3))
    assert float(module.temperature) == 2
    ChoiceTemperature([module], (2.0, 0.3), steps=10).on_step_start(5)
    assert float(module.temperature) == pytest.approx(1.15)
    ChoiceTemperature([module], (2.0, 0.3), steps=100).on_step_start(6)
    assert float(module.temperature) == pytest.approx(1.15)


@pytest.mark.parametrize("form", ["wave_conv", "wave_attn"])
def test_the_penalty_is_the_error_of_the_taps_a_real_token(form: str) -> None:
    if form == "wave_conv":
        mixer = started(WaveConv(WaveConvConfig(filters="learnable"), WIDTH))
    else:
        mixer = started(WaveAttention(WaveAttentionConfig(heads=4, filters="learnable"), WIDTH))
    with torch.no_grad():
        mixer.low_pass.learned_K.add_(0.05 * torch.randn(8))
    valid_BT = torch.ones(2, 60, dtype=torch.bool)
    valid_BT[0, 50:] = False
    x_BTD = torch.randn(2, 60, WIDTH, dtype=torch.float64)
    facts = mixer(x_BTD, context_of(torch.zeros(2, 60, dtype=torch.int64), valid_BT))[1]
    error = orthogonality_error(mixer.low_pass()[0])
    assert float(error.detach()) > 1e-4
    assert_near(facts["penalties"]["wavelet"], 110 * error, 1e-9)


def test_a_layer_takes_one_family_whole_and_learns_which() -> None:
    module = low_pass(families=("db4", "haar")).train()
    bank = [wavelet_taps("db4").float(), torch.cat([wavelet_taps("haar").float(), torch.zeros(6)])]
    taken = set()
    for _ in range(40):
        taps_K = module()[0]
        (number,) = (n for n, own in enumerate(bank) if torch.allclose(taps_K, own, atol=1e-6))
        taken.add(number)
    assert taken == {0, 1}
    target = bank[1]
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (module()[0] - target).square().sum().backward()
        optimizer.step()
    taps_K, facts = module.eval()()
    assert_near(taps_K, target, 1e-6)
    assert float(facts["choice_haar"]) > 0.9


def test_energies_are_shares() -> None:
    mixer = started(WaveConv(WaveConvConfig(), WIDTH))
    ramp = torch.ones(1, 600, 1).expand(1, 600, WIDTH).double()
    context = context_of(torch.zeros(1, 600))
    names = [f"energy_{band}" for band in ("d1", "d2", "d3", "a3")]
    smooth, rough = (mixer(x, context)[1] for x in (ramp, torch.randn_like(ramp)))
    for facts in (smooth, rough):
        assert sum(float(facts[name]) for name in names) == pytest.approx(1)
    assert float(smooth["energy_a3"]) > 0.9 > 0.5 > float(rough["energy_a3"])
