"""Every page in a real Chromium: it draws, fits, can be read in the dark and printed, and asks nobody for anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.report import write_report
from report_folders import HOSTILE, TASKS, analyze_folder, compare_folder, federate_folder, train_folder

Look = Callable[..., Any]

MAKERS: dict[str, Callable[[Path], Path]] = {
    "train": lambda folder: train_folder(folder, [*TASKS, HOSTILE]),
    "train-failed": lambda folder: train_folder(folder, state="failed"),
    "train-50-tasks": lambda folder: train_folder(
        folder, [f"a_task_whose_number_is_{i:02d}_of_50" for i in range(50)]
    ),
    "federate": federate_folder,
    "federate-40-clients": lambda folder: federate_folder(folder, 40),
    "analyze": lambda folder: analyze_folder(folder, layers=16),
    "compare": compare_folder,
}
FIGURES = {
    "train": {"scores", "loss", "loss-per-task"},
    "train-failed": {"loss", "loss-per-task"},
    "train-50-tasks": {"scores", "loss", "loss-per-task"},
    "federate": {"scores", "rounds", "quality-bytes"},
    "federate-40-clients": {"scores", "rounds", "quality-bytes"},
    "analyze": {"similarity-layers", "similarity-maps", "change-layers", "change-steps", "gradient-norms",
                "gradient-conflict", "gates", "gate-entropy"},
    "compare": {"claims", "scores", "delta-m", "quality-bytes"},
}  # fmt: skip

# Of each figure's drawings, the boxes of those that are shown, and how many shapes and words they hold.
SHOWN = """() => [...document.querySelectorAll('figure')].map(figure => ({
  name: figure.id,
  plots: [...figure.querySelectorAll('svg')].filter(svg => getComputedStyle(svg).display !== 'none').map(svg => ({
    width: svg.getBoundingClientRect().width, height: svg.getBoundingClientRect().height,
    right: svg.getBoundingClientRect().right, said: svg.getAttribute('aria-label'),
    shapes: svg.querySelectorAll('path, use, image').length, words: svg.querySelectorAll('text').length,
    outside: [...svg.querySelectorAll('text')].filter(text => {
      const box = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
      return box.left < all.left - 2 || box.right > all.right + 2 || box.bottom > all.bottom + 2;
    }).map(text => text.textContent),
    small: Math.min(...[...svg.querySelectorAll('text')].map(text =>
      parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
  }))}))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Contrast of every text with the background that lies under it (WCAG 2.2, relative luminance).
CONTRAST = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const line = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => line(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const under = node => { for (; node; node = node.parentElement) {
    const found = parse(getComputedStyle(node).backgroundColor); if (found.length < 4 || found[3] > 0) return found; }
    return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
  let seen = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement, words = walk.currentNode.textContent.trim();
    if (!words || !node.checkVisibility()) continue;
    const svg = node.closest('svg'), style = getComputedStyle(node);
    if (node.closest('.on-cell')) continue;  // stands on a cell of a heat map, whose colour is not in the page's style
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(under(svg ? svg.parentElement : node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    seen += 1;
    if (ratio < 4.5) poor.push([words, ratio]);
  }
  return {seen, poor}; }"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a kind's page, drawn at its first use."""
    drawn: dict[str, Path] = {}

    def page(kind: str) -> Path:
        if kind not in drawn:
            drawn[kind] = write_report(MAKERS[kind](tmp_path_factory.mktemp(kind)))
        return drawn[kind]

    return page


@pytest.mark.parametrize("width", ["desktop", "phone"])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_figure_is_drawn_fits_and_nothing_is_asked_for(
    kind: str, width: str, pages: Callable[[str], Path], look: Look
) -> None:
    path = pages(kind)
    seen = look(path, width=width)
    assert seen.messages == []
    assert seen.requests[0] == path.as_uri()
    assert all(url.startswith("data:image/png;base64,") for url in seen.requests[1:])
    figures = seen.ask(SHOWN)
    assert {figure["name"] for figure in figures} == FIGURES[kind]
    assert seen.ask(OVERFLOW) <= 0
    for figure in figures:
        (plot,) = figure["plots"]  # one of the two drawings
        assert plot["width"] > (600 if width == "desktop" else 300), figure["name"]
        assert plot["right"] <= (1280 if width == "desktop" else 390)
        assert plot["height"] > 80
        assert plot["shapes"] > 3
        assert plot["words"] > 3
        assert plot["said"]
        assert plot["small"] >= 9, (figure["name"], plot["small"])
        assert plot["outside"] == [], figure["name"]


@pytest.mark.parametrize("kind", ["train", "federate", "analyze", "compare"])
def test_dark_and_light_can_both_be_read(kind: str, pages: Callable[[str], Path], look: Look) -> None:
    background = "() => getComputedStyle(document.body).backgroundColor"
    first_text = "() => getComputedStyle(document.querySelector('svg.wide text')).fill"
    light, dark = (look(pages(kind), dark=dark) for dark in (False, True))
    assert light.ask(background) == "rgb(255, 255, 255)"
    assert sum(map(int, dark.ask(background)[4:-1].split(","))) < 120
    assert light.ask(first_text) != dark.ask(first_text)
    for seen in (light, dark):
        seen.ask("() => document.querySelectorAll('details').forEach(one => one.open = true)")
        found = seen.ask(CONTRAST)
        assert found["seen"] > 60
        assert found["poor"] == []


@pytest.mark.parametrize("kind", ["train", "analyze"])
def test_it_prints_on_white_with_the_wide_figures_whatever_the_scheme(
    kind: str, pages: Callable[[str], Path], look: Look
) -> None:
    seen = look(pages(kind), width="phone", dark=True)
    seen.page.emulate_media(media="print", color_scheme="dark")
    assert seen.ask("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert seen.ask("() => getComputedStyle(document.querySelector('svg.wide')).display") == "block"
    assert seen.ask("() => getComputedStyle(document.querySelector('svg.narrow')).display") == "none"
    assert (
        seen.ask("() => document.querySelector('details td').getBoundingClientRect().height") > 5
    )  # unfolded
    printed = seen.page.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert len(printed) > 20_000


def test_a_strangers_name_is_text_and_runs_nothing(pages: Callable[[str], Path], look: Look) -> None:
    seen = look(pages("train"))
    assert seen.ask("() => document.scripts.length") == 0
    assert "<script>alert(1)</script> & $x_1$" in seen.page.inner_text("table")
    assert any("<script>" in label for label in seen.page.locator("svg.wide text").all_text_contents())


def test_the_policy_lets_nothing_load_even_if_the_page_asked(
    pages: Callable[[str], Path], look: Look
) -> None:
    seen = look(pages("train"))
    seen.ask(
        "() => { const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);"
        " const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        " document.body.append(script); }"
    )
    assert seen.ask("() => window.ran") is None
    assert sum("Content Security Policy" in message for message in seen.messages) == 2
