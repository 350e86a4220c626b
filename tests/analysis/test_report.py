"""The analysis as a page: whole, readable on any screen, without network, and searchable."""

import json
from typing import Any

import pytest

from browser import SCREENS, Screen, check_page, opened
from sra_ds.analysis.report import inline_svg

FIGURES = 8


@pytest.fixture(scope="module")
def page_path(analysed: Any) -> Any:
    assert analysed.result.returncode == 0, analysed.result.stderr
    return analysed.out / "report.html"


@pytest.mark.parametrize("screen", SCREENS, ids=str)
def test_the_report_can_be_read_on_any_screen(
    chromium: Any, page_path: Any, screen: Screen
) -> None:
    with opened(chromium, page_path, screen) as page:
        check_page(page, FIGURES)
        for part in page.locator("details").all():
            part.evaluate("part => part.open = true")
        check_page(page, FIGURES)


def test_the_page_says_what_the_analysis_says(chromium: Any, page_path: Any, analysed: Any) -> None:
    """Tokens as they are, also those that look like HTML; every measure of every layer and run."""
    whole = json.loads((analysed.out / "analysis.json").read_text())
    experts = [*whole["experts"], *whole["against"][0]["experts"]]
    with opened(chromium, page_path, SCREENS[2]) as page:
        rows = page.locator(".row").all()
        assert len(rows) == len(experts) == 16
        for row, expert in zip(rows, experts, strict=True):
            assert row.locator(".tok").all_text_contents() == expert["top_tokens"]
            place = f"{expert['layer']}:{expert['expert']}"
            assert row.locator("b").text_content() == place
            found = " ".join(expert["top_tokens"]), " ".join(expert["top_words"])
            searched = " ".join([place, expert["specialisation"], *found])
            assert row.get_attribute("data-text") == searched
        tokens = {token for expert in experts for token in expert["top_tokens"]}
        assert {"<", "&", '"'} <= {character for token in tokens for character in token}
        measures = page.locator(".measure").all()
        assert len(measures) == len(whole["layers"][0]["measures"])
        assert all(measure.locator("li").count() == 4 for measure in measures)
        assert "page.md" in page.locator("p").first.text_content()


@pytest.mark.parametrize("screen", SCREENS[::2], ids=str)
def test_the_filter_hides_other_experts(chromium: Any, page_path: Any, screen: Screen) -> None:
    """By place and by word; an empty field shows all again."""
    with opened(chromium, page_path, screen) as page:
        field, visible = page.locator("#filter"), page.locator(".row:visible")
        field.fill("1:2")
        assert {row.locator("b").text_content() for row in visible.all()} == {"1:2"}
        assert visible.count() == 2  # one of each run
        field.fill("BOLD")
        texts = [row.get_attribute("data-text") or "" for row in page.locator(".row").all()]
        wanted = [text for text in texts if "bold" in text.lower()]
        assert 0 < len(wanted) < len(texts)
        assert [row.get_attribute("data-text") for row in visible.all()] == wanted
        field.fill("nothing of the kind")
        assert visible.count() == 0
        field.fill("")
        assert page.locator(".row[hidden]").count() == 0


def test_a_figure_takes_the_pages_width_and_colour() -> None:
    head, path = (
        '<svg width="9pt" height="5pt" viewBox="0 0 9 5">',
        '<path stroke="#7a7a7b"/></svg>',
    )
    assert inline_svg(f'<?xml version="1.0"?>\n{head}{path}') == (
        '<svg viewBox="0 0 9 5" role="img"><path stroke="currentColor"/></svg>'
    )
