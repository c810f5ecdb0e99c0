"""The page of ``eaft-ext inspect --html`` in a browser: keys, filters, hostile text, themes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MISSING = "needs playwright and Chromium: pip install 'eaft_ext[demo,browser]' and a chromium"
for _name in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(_name, reason="pip install 'eaft_ext[demo]' brings what it needs")
playwright = pytest.importorskip("playwright.sync_api", reason=MISSING)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

from inspect_page import (  # noqa: E402
    HOSTILE,
    PLAIN,
    inspect,
    sure_folder,
    tokens_of,
    tuned_folder,
    write_texts,
)

from eaft_ext.cli.inspect.page.safe import safe  # noqa: E402
from eaft_ext.cli.palette import REGIONS  # noqa: E402

__all__ = ["sure_folder", "tuned_folder"]

OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page, which must ask for nothing and complain of nothing."""
    complaints: list[str] = []
    contexts = []

    def open_page(file: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url))
        page.goto(file.as_uri())
        complaints.remove(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def made(sure_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A page, and the tokens that it is of."""
    folder = tmp_path_factory.mktemp("made")
    html, output = folder / "page.html", folder / "tokens.jsonl"
    data = write_texts(folder / "data.jsonl", PLAIN)
    assert inspect(sure_folder, data, "--html", str(html), "--output", str(output)) == 0
    return html, tokens_of(output)


def _listed(page: Any) -> list[list[str]]:
    """The cells of the list's rows."""
    rows: list[list[str]] = page.eval_on_selector_all(
        "#list tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return rows


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_in_both_themes(opened: Any, made: tuple[Path, list[Any]], scheme: str) -> None:
    """One landscape is there, and every text is told apart from its ground."""
    page = opened(made[0], color_scheme=scheme)
    shown = page.locator("figure svg").evaluate_all(
        "all => all.map(svg => svg.getBoundingClientRect().width > 300)"
    )
    assert sorted(shown) == [False, True]
    assert page.locator(f".only-{scheme} svg").is_visible()
    contrasts = page.evaluate(
        """() => {
          const light = (text) => {
            const parts = text.match(/[\\d.]+/g).map(Number).slice(0, 3).map((one) => {
              const part = one / 255;
              return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const ground = light(getComputedStyle(document.body).backgroundColor);
          const names = "h1, caption, .note, th small, .text, .sign, td, .link";
          return [...document.querySelectorAll(names)].map((one) => {
            const ink = light(getComputedStyle(one).color);
            const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
            return [ratio, `${one.tagName} ${one.className}`];
          });
        }"""
    )
    assert len(contrasts) > 50 and min(contrasts)[0] >= 4.5, min(contrasts)


def test_the_list_is_filtered_and_sorted(opened: Any, made: tuple[Path, list[Any]]) -> None:
    html, tokens = made
    page = opened(html)

    def expected(region: str) -> list[Any]:
        return [token for token in tokens if token["region"] == region]

    worst = sorted(expected("conflict"), key=lambda one: -(1 - one["gate"]) * one["nll"])
    first = _listed(page)
    assert [row[1].strip() for row in first[:5]] == [one["token"].strip() for one in worst[:5]]
    assert page.locator("#found").text_content().startswith(f"{len(worst)} tokens")
    for region in REGIONS:
        page.locator("#controls [name=region]").select_option(region)
        rows = _listed(page)
        assert {row[-1][2:] for row in rows} == {REGIONS[region].title}
        assert len(rows) == min(100, len(expected(region)))
    page.locator("#controls [name=region]").select_option("")
    page.locator("#controls [name=sort]").select_option("text")
    assert len(_listed(page)) == 100 < len(tokens)
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    said = [row[1].replace("\N{OPEN BOX}", " ") for row in _listed(page)]
    assert said == [token["token"] for token in tokens]
    page.locator("#controls [name=word]").fill("STATE")
    assert {row[1].strip() for row in _listed(page)} == {"statement"}
    page.locator("#controls [name=word]").fill("")
    page.locator('#shares [data-filter="known"]').click()
    assert {row[-1][2:] for row in _listed(page)} == {"known"}


def test_cards_by_keyboard_and_mouse(opened: Any, made: tuple[Path, list[Any]]) -> None:
    """Tab goes to the first token, arrows to others, Enter opens a card, Escape closes it."""
    html, tokens = made
    page = opened(html)
    page.locator("#order").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.dataset.token"
    assert page.evaluate(focused) == "2"
    card = page.locator("#card")
    assert not card.is_visible()
    page.keyboard.press("Enter")
    assert card.is_visible()
    text = card.inner_text()
    token = tokens[2]
    assert f"{token['probability']:.3f}" in text and f"{token['gate']:.3f}" in text
    assert REGIONS[token["region"]].title in text
    for word, chance in token["alternatives"]:
        shown = f"{chance:.3f}" if round(chance, 3) else "0.000"
        assert word.strip() in text and shown in text
    assert page.evaluate("document.activeElement.textContent") == "Close"
    page.keyboard.press("Escape")
    assert not card.is_visible() and page.evaluate(focused) == "2"
    page.keyboard.press("ArrowDown")
    second = next(i for i, token in enumerate(tokens) if token["row"] == 1)
    assert page.evaluate(focused) == str(second)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == "0"
    page.locator('[data-token="4"]').hover()
    assert card.is_visible()
    page.locator("h1").hover()
    assert not card.is_visible()
    page.locator("#list tbody button").first.click()
    assert card.is_visible()
    page.locator("#card .close").click()
    assert not card.is_visible()
    back = "document.activeElement === document.querySelector('#list tbody button')"
    assert page.evaluate(back)
    page.locator("#order").select_option("conflicts")
    page.locator('[data-token="0"]').focus()
    page.keyboard.press("ArrowDown")  # in the order of the screen
    order = page.eval_on_selector_all(".row", "rows => rows.map(row => Number(row.dataset.index))")
    below = order[order.index(0) + 1 :][:1] or [0]
    assert tokens[int(page.evaluate(focused))]["row"] == below[0]


def test_hostile_text_is_text(opened: Any, sure_folder: Path, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    data = write_texts(tmp_path / "data.jsonl", HOSTILE)
    assert inspect(sure_folder, data, "--html", str(html), "--sequence-length", "128") == 0
    page = opened(html)
    title = page.title()
    rows = page.locator(".row")
    assert rows.count() == len(HOSTILE)
    for index, hostile in enumerate(HOSTILE):
        rows.nth(index).scroll_into_view_if_needed()
        page.wait_for_function(f"document.querySelectorAll('.text')[{index}].dataset.built")
        assert safe(hostile)[:90] in rows.nth(index).locator(".text").text_content()
    assert page.title() == title == f"{sure_folder.name} on data.jsonl"
    assert page.evaluate("document.images.length + document.scripts.length") == 2
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(wide)


def test_on_a_phone(opened: Any, made: tuple[Path, list[Any]]) -> None:
    page = opened(made[0])
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator('[data-token="0"]').click()
    box = page.locator("#card").bounding_box()
    assert box["x"] == 0 and box["width"] == 360 and box["y"] + box["height"] == 640


def test_two_models(opened: Any, sure_folder: Path, tuned_folder: Path, tmp_path: Path) -> None:
    html, output = tmp_path / "page.html", tmp_path / "tokens.jsonl"
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    files = ("--html", str(html), "--output", str(output))
    assert inspect(sure_folder, data, "--against", str(tuned_folder), *files) == 0
    tokens = tokens_of(output)
    page = opened(html)
    moves = page.locator("#moved button")
    for index in range(moves.count()):
        button = moves.nth(index)
        before, after = (button.get_attribute(f"data-{name}") for name in ("filter", "after"))
        button.click()
        found = [t for t in tokens if (t["region"], t["after"]["region"]) == (before, after)]
        assert page.locator("#found").text_content().startswith(f"{len(found)} tokens")
        assert button.text_content() == str(len(found))
    page.locator("#controls [name=region]").select_option("")
    page.locator("#controls [name=after]").select_option("")
    page.locator("#controls [name=sort]").select_option("lost")
    lost = max(tokens, key=lambda token: token["after"]["nll"] - token["nll"])
    assert (
        _listed(page)[0][7] == f"{lost['nll']:.3f} \N{RIGHTWARDS ARROW} {lost['after']['nll']:.3f}"
    )


def test_many_tokens_stay_smooth(opened: Any, sure_folder: Path, tmp_path: Path) -> None:
    """Of 20,000 tokens the texts become spans as they come near; nearly every step is short."""
    html = tmp_path / "page.html"
    data = write_texts(tmp_path / "data.jsonl", [f"{text} " * 8 for text in PLAIN * 13])
    options = ("--sequence-length", "128", "--batch-size", "32", "--html", str(html))
    assert inspect(sure_folder, data, *options) == 0
    page = opened(html)
    count = page.evaluate(
        """JSON.parse(document.getElementById("data").textContent).rows
          .map((row) => row.positions.length).reduce((sum, one) => sum + one)"""
    )
    assert count > 20_000
    longest = page.evaluate(
        """async () => {
          const frames = [];
          document.documentElement.style.scrollBehavior = "auto";
          document.getElementById("texts").scrollIntoView();
          let last = performance.now();
          for (let i = 0; i < 60; i++) {
            scrollBy(0, 400);
            await new Promise(requestAnimationFrame);
            frames.push(performance.now() - last);
            last = performance.now();
          }
          return frames.sort((a, b) => a - b)[frames.length - 5]; // the machine has other work
        }"""
    )
    built = page.locator(".text[data-built]").count()
    assert 10 < built < 13 * len(PLAIN)
    assert longest < 100, f"{longest:.0f} ms for a step"
