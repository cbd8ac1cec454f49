"""What the tabs of the page do, and the page in a browser; STARFLOW_SCREENSHOTS names a folder for pictures of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image, ImageDraw

from starflow import StarFlowPipeline
from starflow.errors import UserError
from starflow.pipeline.likelihood import LogProb
from starflow.serve.app import CHANGE, FILL, Mistake, Page, add_page, chosen_seed, over, read_editor, verdict
from starflow.serve.drawing import PromptLikelihood
from starflow.serve.service import Service
from tests.serve.conftest import Running, running, untrained_student

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 120_000
"""Milliseconds that a busy machine may take."""


def strokes(size: tuple[int, int]) -> Image.Image:
    """A layer with a painted square."""
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).rectangle((2, 2, 5, 5), fill="#ff00ff")
    return layer


GREY = Image.new("RGBA", (16, 16), (90, 90, 90, 255))
PAINTED = numpy.zeros((16, 16), bool)
PAINTED[2:6, 2:6] = True


@pytest.mark.parametrize(
    ("layers", "composite"),
    [
        ([strokes((16, 16))], GREY),
        ([Image.new("RGBA", (16, 16)), strokes((16, 16))], None),
        ([], Image.alpha_composite(GREY, strokes((16, 16)))),
        (None, Image.alpha_composite(GREY, strokes((16, 16)))),
        ([strokes((16, 16)).resize((32, 32), Image.Resampling.NEAREST)], GREY),
    ],
)
def test_the_mask_is_what_was_painted_wherever_gradio_put_it(layers: Any, composite: Any) -> None:
    picture, mask = read_editor({"background": GREY, "layers": layers, "composite": composite})
    assert picture is GREY
    assert mask is not None
    assert (numpy.asarray(mask) == 255 * PAINTED).all()


def test_an_editor_without_strokes_has_no_mask_and_without_a_picture_is_a_mistake() -> None:
    assert read_editor({"background": GREY, "layers": [Image.new("RGBA", (16, 16))], "composite": GREY})[1] is None
    nothing: list[dict[str, Any] | None] = [None, {"background": None, "layers": [], "composite": None}]
    for empty in nothing:
        with pytest.raises(Mistake, match="upload"):
            read_editor(empty)


def test_seeds_are_those_of_the_field_or_new_ones() -> None:
    assert chosen_seed(7.0, by_chance=False) == 7
    assert len({chosen_seed(7.0, by_chance=True) for _ in range(20)}) > 10
    for wrong in (None, -1, 0.5, 2.0**60):
        with pytest.raises(Mistake, match="seed"):
            chosen_seed(wrong, by_chance=False)


def test_the_verdict_names_the_best_prompt_and_by_how_much() -> None:
    one, other = (LogProb(nats, 1.0, 8, "noised latent", 2, 1.0, (nats - 1, nats + 1)) for nats in (-50.0, -40.0))
    found = [PromptLikelihood("a cat", one, None), PromptLikelihood("a car", other, None)]
    assert verdict(found) == "'a car' fits best, by 10.0 ± 0.0 nats before 'a cat'"
    assert verdict(found[:1]).startswith("-50.0 nats, 1.0000 bits/dim")


def test_heat_lies_over_the_picture() -> None:
    laid = over(Image.new("RGB", (4, 4), "white"), Image.new("RGB", (2, 2), "red"))
    assert laid.size == (4, 4)
    red, green, blue = laid.getpixel((0, 0))  # type: ignore[misc]
    assert red > green == blue > 0


@pytest.fixture(scope="module")
def page(api: Running) -> Page:
    return Page(api.service)


def test_previews_come_before_pictures_and_each_with_its_log_p(page: Page) -> None:
    steps = list(page.draw("a red apple", 2, 5, False, 1.0, 0.5, 2, True, "flow", "me"))
    captions = [[text for _, text in pictures] for pictures, _, _ in steps if pictures]
    assert captions[0][0] == "preview"
    assert len(captions[-1]) == 4
    assert all(text.startswith("log p") for text in captions[-1])
    assert {seed for _, seed, _ in steps} == {5}
    assert "2 drawn" in steps[-1][2]


def test_a_page_that_is_left_cancels_what_it_asked_for(page: Page) -> None:
    scheduler = page.service.scheduler
    assert scheduler is not None
    steps = page.draw("a red apple", 16, 0, False, 1.0, 0.5, 8, False, "flow", "me")
    next(steps)
    assert scheduler.waiting + scheduler.at_work > 0
    steps.close()  # type: ignore[attr-defined]
    assert page.service.scheduler is not None
    assert list(page.draw("a red apple", 1, 0, False, 1.0, 0.5, 1, False, "flow", "me"))
    assert scheduler.waiting + scheduler.at_work == 0


def test_a_student_draws_where_there_is_one(page: Page, box: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert box.student is not None
    own = box.student.config
    assert page.choices("student") == [own.guidance, own.temperature, 1]
    assert page.choices("flow") == [3.0, 0.5, 8]
    monkeypatch.setattr(box, "student", None)
    with pytest.raises(UserError, match="has none"):
        list(page.draw("a red apple", 1, 0, False, 0.0, 1.0, 1, False, "student", "me"))
    monkeypatch.setattr(box, "student", untrained_student(box))
    *_, (pictures, _, _) = page.draw("a red apple", 2, 5, False, 0.0, 1.0, 1, False, "student", "me")
    assert pictures is not None
    wanted = box("a red apple", num_images=2, seed=5, guidance=0.0, temperature=1.0, candidates=1, sampler="student")
    for (found, caption), drawn, seed in zip(pictures, wanted.images, (5, 6), strict=True):
        assert caption == f"seed {seed}"
        assert abs(numpy.asarray(found).astype(int) - numpy.asarray(drawn).astype(int)).max() <= 1


def test_an_edit_changes_a_picture_and_a_filling_wants_a_mask(page: Page, box: StarFlowPipeline) -> None:
    drawn = box("a red apple", seed=1, candidates=1).images[0]
    editor = {"background": drawn, "layers": [], "composite": drawn}
    steps = list(page.edit(editor, CHANGE, "a blue car", "a red apple", 0.5, 0.0, 2, 3, False, "me"))
    assert [text.startswith("log p") for _, text in steps[-1][0] or ()] == [True, True]
    with pytest.raises(Mistake, match="paint"):
        list(page.edit(editor, FILL, "a", None, 0.5, 0.0, 1, 3, False, "me"))


def test_judging_finds_the_prompt_that_was_drawn(page: Page, box: StarFlowPipeline) -> None:
    drawn = box("a red apple", seed=1, candidates=1).images[0]
    *_, (rows, heat, line) = page.judge(drawn, "a blue car\n\n a red apple \n", 2, "me")
    assert rows is not None
    assert heat is not None
    assert [row[0] for row in rows] == ["a blue car", "a red apple"]
    assert line.startswith("'a red apple' fits best")
    assert len(heat) == 3
    with pytest.raises(Mistake, match="upload"):
        list(page.judge(None, "a", 1, "me"))
    with pytest.raises(Mistake, match="at most 16"):
        list(page.judge(drawn, "a\n" * 17, 1, "me"))


@pytest.fixture(scope="module")
def site(box: StarFlowPipeline) -> Iterator[Running]:
    pytest.importorskip("gradio")
    with running(Service(lambda: box, "glyphs"), add_page) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


def visit(browser: Any, site: Running, width: int = 1200, height: int = 900) -> Any:
    """The page, open; it asks nobody but the service."""
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.set_default_timeout(PATIENCE)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(site.url)
    opened.wait_for_selector("text=knows how likely a picture is")
    outside = [url for url in asked if not url.startswith((site.url, "data:", "blob:"))]
    assert not outside
    return opened


def screenshot(opened: Any, name: str) -> None:
    folder = os.environ.get("STARFLOW_SCREENSHOTS")
    if folder:
        opened.wait_for_timeout(1500)  # pictures fade in
        opened.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def draw(opened: Any, prompt: str) -> None:
    opened.get_by_label("Prompt", exact=True).fill(prompt)
    opened.get_by_role("button", name="Draw").click()


@pytest.mark.slow
def test_a_picture_is_made_and_its_seed_shown(browser: Any, site: Running) -> None:
    opened = visit(browser, site)
    opened.get_by_text("a blue car").click()
    opened.get_by_role("button", name="Draw").click()
    opened.wait_for_selector("text=4 drawn in")
    assert opened.locator(".grid-container img").count() == 4
    assert opened.get_by_label("Seed", exact=True).first.input_value() in opened.locator("text=4 drawn in").inner_text()
    screenshot(opened, "create")
    opened.close()


@pytest.mark.slow
def test_a_mask_is_drawn_with_the_mouse_and_filled(
    browser: Any, site: Running, box: StarFlowPipeline, tmp_path: Path
) -> None:
    """The mask survives a look at another tab; what was not painted comes back bit for bit."""
    box("a red apple", seed=1, candidates=8, guidance=3.0, temperature=0.5).images[0].save(tmp_path / "apple.png")
    opened = visit(browser, site)
    opened.get_by_role("tab", name="Edit").click()
    canvas = opened.locator("canvas:visible").first
    canvas.wait_for()
    opened.wait_for_timeout(1000)  # a file that comes before the editor listens is lost
    opened.locator("#edited-picture input[type=file]").first.set_input_files(str(tmp_path / "apple.png"))
    opened.wait_for_timeout(3000)  # the editor lays the picture out
    assert not opened.get_by_text("select the draw tool to start").is_visible()
    place = canvas.bounding_box()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    for dy in (0, 30, 60):
        opened.mouse.move(x - 50, y + dy)
        opened.mouse.down()
        opened.mouse.move(x + 50, y + dy, steps=12)
        opened.mouse.up()
    opened.get_by_role("tab", name="Create").click()
    opened.get_by_role("tab", name="Edit").click()
    opened.get_by_label("New prompt").fill("a red apple")
    opened.get_by_role("button", name="Edit", exact=True).click()
    opened.wait_for_selector("text=2 made in", timeout=300_000)  # two fillings, on a processor that is busy
    screenshot(opened, "edit")
    source = opened.locator(".grid-container img").nth(0).get_attribute("src")
    made = opened.request.get(source).body()
    (tmp_path / "made.png").write_bytes(made)
    before, after = (
        numpy.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("apple.png", "made.png")
    )
    changed = (before != after).any(-1)
    assert 0.02 < changed.mean() < 0.5
    rows, columns = changed.nonzero()
    assert rows.min() > 20
    assert columns.min() > 10
    assert columns.max() < 54
    opened.close()


@pytest.mark.slow
def test_a_picture_is_uploaded_and_judged(browser: Any, site: Running, box: StarFlowPipeline, tmp_path: Path) -> None:
    box("a red apple", seed=1, candidates=1).images[0].save(tmp_path / "apple.png")
    opened = visit(browser, site)
    opened.get_by_role("tab", name="Likelihood").click()
    opened.locator("#judged-picture input[type=file]").first.set_input_files(str(tmp_path / "apple.png"))
    opened.locator("#judged-picture img").wait_for()
    opened.get_by_label("Prompts, one a line").fill("a red apple\na blue car")
    opened.get_by_role("button", name="Judge").click()
    opened.get_by_text("fits best").wait_for()
    assert "'a red apple' fits best" in opened.get_by_text("fits best").inner_text()
    screenshot(opened, "likelihood")
    opened.close()


@pytest.mark.slow
def test_a_mistake_is_one_line_and_the_page_goes_on(browser: Any, site: Running) -> None:
    opened = visit(browser, site)
    opened.get_by_role("tab", name="Likelihood").click()
    opened.get_by_role("button", name="Judge").click()
    opened.wait_for_selector("text=there is no picture: upload one")
    screenshot(opened, "mistake")
    assert "Traceback" not in opened.content()
    opened.get_by_role("tab", name="Create").click()
    draw(opened, "a red apple")
    opened.wait_for_selector("text=4 drawn in")
    opened.close()


@pytest.mark.slow
def test_two_users_draw_at_once(browser: Any, site: Running) -> None:
    first, second = visit(browser, site), visit(browser, site)
    draw(first, "a red apple")
    draw(second, "a blue car")
    for opened in (first, second):
        opened.wait_for_selector("text=4 drawn in")
        assert opened.locator(".grid-container img").count() == 4
        opened.close()


@pytest.mark.slow
def test_a_narrow_screen_has_everything_and_no_sideways_scrolling(browser: Any, site: Running) -> None:
    opened = visit(browser, site, width=380, height=800)
    draw(opened, "a red apple")
    opened.wait_for_selector("text=4 drawn in")
    screenshot(opened, "narrow")
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    opened.close()
