"""Pages as people see them, on a telephone and on a large screen, in light and in dark: in Chromium.

A `conftest.py` that imports `chromium` makes it a fixture. Then, for every one of `SCREENS`:

    with opened(chromium, path, screen) as page:
        check_page(page, figures=3)
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOCAL = ("file:", "data:")
CONTRAST = 7.0
"""WCAG 2.2, success criterion 1.4.6."""
LUMINANCE = """element => {
  const rgb = colour => {
    const pixel = new OffscreenCanvas(1, 1).getContext("2d");
    pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = rgb(colour).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(element);
  return [luminance(style.color), luminance(style.backgroundColor)];
}"""


class Screen(NamedTuple):
    """Width in pixels and colour scheme, `light` or `dark`."""

    width: int
    scheme: str

    def __str__(self) -> str:
        return f"{self.width} {self.scheme}"


SCREENS = [Screen(width, scheme) for width in (390, 1400) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail(
            "this test opens a page in Chromium, which is not installed: run `make chromium`"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, screen: Screen) -> Iterator[Page]:
    """The page of a local file. At the end of the block: it had no error and asked for nothing else."""
    size = {"width": screen.width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=screen.scheme)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"not loaded: {request.url}"))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on(
        "request",
        lambda request: None if request.url.startswith(LOCAL) else problems.append(request.url),
    )
    page.goto(path.resolve().as_uri())
    yield page
    context.close()
    assert not problems, problems


def check_page(page: Page, figures: int) -> None:
    """It fits into its width, its text can be read, and its figures can be seen."""
    wide, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert wide <= inner, f"{wide} pixels wide, the window has {inner}"
    text, ground = page.locator("body").evaluate(LUMINANCE)
    lighter, darker = max(text, ground), min(text, ground)
    contrast = (lighter + 0.05) / (darker + 0.05)
    assert contrast >= CONTRAST, f"contrast of {contrast:.1f}"
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (text > ground), "the page does not follow the colour scheme"
    drawn = page.locator("figure").all()
    assert len(drawn) == figures, f"{len(drawn)} figures"
    for figure in drawn:
        svg, name = figure.locator("svg").first, figure.get_attribute("id")
        assert svg.is_visible(), f"{name} cannot be seen"
        box = svg.bounding_box()
        assert box is not None and min(box["width"], box["height"]) > 40, f"{name} is too small"
