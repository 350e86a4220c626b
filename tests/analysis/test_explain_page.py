"""The page that explains a text: readable on any screen, every token with its experts, layer by layer."""

from typing import Any

import pytest

from browser import SCREENS, Screen, check_page, opened
from sra_ds.analysis.explain import Explanation, explain
from sra_ds.analysis.report import explanation_html
from sra_ds.inference.load import load_run

TEXT = 'abc <b>def</b> & "gab" ' * 9


@pytest.fixture
def explanation(make_run: Any) -> Explanation:
    return explain(load_run(make_run().path), TEXT)


@pytest.fixture
def page_path(explanation: Explanation, tmp_path: Any) -> Any:
    path = tmp_path / "page.html"
    path.write_text(explanation_html(explanation, "run"), "utf-8")
    return path


@pytest.mark.parametrize("screen", SCREENS, ids=str)
def test_the_page_can_be_read_on_any_screen(chromium: Any, page_path: Any, screen: Screen) -> None:
    with opened(chromium, page_path, screen) as page:
        check_page(page, figures=0)
        page.locator("#text button").nth(5).click()
        check_page(page, figures=0)


@pytest.mark.parametrize("way", ["hover", "focus"])
def test_a_token_shows_its_experts_layer_by_layer(
    chromium: Any, page_path: Any, explanation: Explanation, way: str
) -> None:
    with opened(chromium, page_path, SCREENS[2]) as page:
        tokens = page.locator("#text button")
        assert tokens.count() == len(explanation.tokens)
        for layer in (0, 1):
            page.locator(f"input[value='{layer}']").check()
            getattr(tokens.nth(7), way)()
            decision = explanation.decisions[7][layer]
            lines = page.locator("#detail li").all_text_contents()
            wanted = [f"expert {c.expert}," for c in (*decision.chosen, *decision.near)]
            assert len(lines) == len(wanted) == 4
            assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True))
            assert f"cosine {decision.chosen[0].cosine:.3f}" in lines[0]
            assert f"layer {layer}" in page.locator("#detail b").text_content()
            page.mouse.move(0, 0)
            page.locator("h1").click()


def test_tokens_of_one_first_choice_share_a_colour(
    chromium: Any, page_path: Any, explanation: Explanation
) -> None:
    with opened(chromium, page_path, SCREENS[0]) as page:
        paint = "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
        for layer in (0, 1):
            page.locator(f"input[value='{layer}']").check()
            colours = page.locator("#text button").evaluate_all(paint)
            first = [layers[layer].chosen[0].expert for layers in explanation.decisions]
            assert (
                len(set(zip(colours, first, strict=True))) == len(set(first)) == len(set(colours))
            )
