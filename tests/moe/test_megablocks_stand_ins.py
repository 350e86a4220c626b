"""The stand-ins for MegaBlocks' compiled packages against loops, and against what MegaBlocks calls."""

import ast
import importlib
import importlib.util
import inspect
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sra_ds.errors import BackendUnavailable
from sra_ds.moe.backends.megablocks import load_library
from sra_ds.moe.backends.stand_ins import grouped_gemm, megablocks_ops, provide_missing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SEVEN = {
    "exclusive_cumsum",
    "histogram",
    "inclusive_cumsum",
    "indices",
    "replicate_backward",
    "replicate_forward",
    "sort",
}


def calls_of(paths: list[Path], objects: set[str]) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call of a function of `objects` in source files."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                found += [(f"{owner}.{node.func.attr}", node)] if owner in objects else []
    return found


def test_stand_ins_take_what_megablocks_calls_them_with() -> None:
    spec = importlib.util.find_spec("megablocks")
    if spec is None or spec.origin is None:
        pytest.skip("needs MegaBlocks: make megablocks")
    package = Path(spec.origin).parent
    sources = [p for p in package.rglob("*.py") if "import megablocks_ops as ops" in p.read_text()]
    called = calls_of(sources, {"ops"})
    assert {name for name, _ in called} == {f"ops.{name}" for name in SEVEN}
    products = calls_of([*package.rglob("layers/*.py")], {"gg.ops", "gg.backend"})
    assert {name for name, _ in products} == {"gg.ops.gmm", "gg.backend.gmm"}
    for name, call in called + products:
        target = megablocks_ops if name.startswith("ops.") else grouped_gemm
        function = attrgetter(name.partition(".")[2])(target)
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(function).bind(*call.args, **keywords)


def running_sums(x_BN: Tensor, own: bool) -> list[list[int]]:
    return [[sum(row[: n + own]) for n in range(len(row))] for row in x_BN.tolist()]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_stand_ins_sort_count_and_sum(dtype: torch.dtype) -> None:
    for entries in (0, 1, 63):
        x_N = torch.randint(5, (entries,), dtype=dtype)
        pairs = sorted((value, n) for n, value in enumerate(x_N.tolist()))
        sorted_N, order_N = torch.full((2, entries), -1, dtype=dtype)
        megablocks_ops.sort(x_N, 3, sorted_N, order_N)
        assert list(zip(sorted_N.tolist(), order_N.tolist(), strict=True)) == pairs
        for bins in (1, 3, 8):
            counts_E = megablocks_ops.histogram(x_N, bins)
            assert counts_E.tolist() == [x_N.tolist().count(e) for e in range(bins)]
            assert counts_E.dtype == torch.int32 and counts_E.is_contiguous()
        x_BN = torch.randint(-2, 9, (3, entries), dtype=dtype)
        expected = [[row.count(e) for e in range(7)] for row in x_BN.tolist()]
        assert megablocks_ops.histogram(x_BN, 7).tolist() == expected
        out_BN = torch.full_like(x_BN, -99)
        megablocks_ops.inclusive_cumsum(x_BN, 1, out_BN)
        assert out_BN.tolist() == running_sums(x_BN, own=True)
        megablocks_ops.exclusive_cumsum(x_BN, 1, out_BN)
        assert out_BN.tolist() == running_sums(x_BN, own=False)


def test_stand_ins_repeat_and_place_blocks() -> None:
    counts = [2, 0, 1, 3]
    bin_of = [e for e, count in enumerate(counts) for _ in range(count)]
    bins_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    x_BE, out_BM = torch.randn(3, 4), torch.full((3, 6), torch.nan)
    megablocks_ops.replicate_forward(x_BE, bins_E, out_BM)
    assert torch.equal(out_BM, torch.stack([x_BE[:, e] for e in bin_of], 1))
    grad_BM, grad_BE = torch.randn(3, 6).half(), torch.full((3, 4), torch.nan).half()
    megablocks_ops.replicate_backward(grad_BM, bins_E, grad_BE)
    parts = grad_BM.float().split(counts, 1)
    expected_BE = torch.stack([part.sum(1) for part in parts], 1).half()
    torch.testing.assert_close(grad_BE, expected_BE)
    columns = torch.full((18,), -1, dtype=torch.int16)
    megablocks_ops.indices(128 * bins_E, 128, 6, 3, columns)
    assert columns.tolist() == [e * 3 + column for e in bin_of for column in range(3)]


def test_stand_in_products_equal_loops_over_groups() -> None:
    sizes = [3, 0, 4]
    batch_sizes_E = torch.tensor(sizes)
    a_RI, b_EIO, y_RO = torch.randn(7, 8), torch.randn(3, 8, 16), torch.randn(7, 16)
    rows = [*zip(a_RI.split(sizes), y_RO.split(sizes), strict=True)]
    forward_RO = torch.cat([a @ b for (a, _), b in zip(rows, b_EIO, strict=True)])
    outer_EIO = torch.stack([a.T @ y for a, y in rows])
    b_EOI = b_EIO.transpose(1, 2).contiguous()
    given = torch.full_like(forward_RO, torch.nan)
    for actual, expected in (
        (grouped_gemm.ops.gmm(a_RI, b_EIO, batch_sizes_E), forward_RO),
        (grouped_gemm.ops.gmm(a_RI, b_EOI, batch_sizes_E, trans_b=True), forward_RO),
        (grouped_gemm.backend.gmm(a_RI, b_EIO, batch_sizes_E, c=given), forward_RO),
        (given, forward_RO),
        (grouped_gemm.backend.gmm(a_RI, y_RO, batch_sizes_E, trans_a=True), outer_EIO),
    ):
        torch.testing.assert_close(actual, expected)


def forget(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if never imported, until the test ends."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


def test_a_missing_package_gets_its_stand_in_and_an_installed_one_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forget(monkeypatch, "megablocks_ops", "grouped_gemm")
    (tmp_path / "megablocks_ops.py").write_text("installed = True")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for _ in range(2):
        provide_missing()
        assert sys.modules["megablocks_ops"].installed
        assert sys.modules["grouped_gemm"] is grouped_gemm


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('x.so: undefined symbol')", r"x\.so: undefined symbol"),
        ("import a_package_of_its_own", "a_package_of_its_own"),
    ],
)
def test_an_installed_package_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, said: str
) -> None:
    forget(monkeypatch, "grouped_gemm")
    (tmp_path / "grouped_gemm.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=rf"{said}.*make megablocks"):
        load_library()
