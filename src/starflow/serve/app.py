"""The web page: draw, edit and judge pictures, through the same scheduler as the HTTP service.

It needs no internet: fonts are the system's, and scripts come from the installed gradio. gradio reads annotations when
a handler is made, so this file has them evaluated, unlike the others.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageChops

from starflow.pipeline.config import default_size, own_guidance, with_sampling_options
from starflow.pipeline.inputs import example_prompts
from starflow.serve.drawing import EditRequest, PromptLikelihood, edit_calls, likelihood_call, seen_by, student_calls
from starflow.serve.queue import Drawn, DrawRequest, Event, follow
from starflow.serve.schemas import STUDENT_COST, failure_of
from starflow.serve.service import LOGGER, Service

if TYPE_CHECKING:
    from fastapi import FastAPI

LOAD_SECONDS = 300.0
"""That the page waits for the model."""

LONGEST_PROMPT = 500

SOURCES = ["upload", "clipboard"]
"""Of pictures."""

SAMPLERS = [("the flow", "flow"), ("the student, faster and rougher", "student")]

CSS = """
.gradio-container {width: 100% !important; max-width: 1100px !important; margin: auto}
footer {display: none !important}
@media (max-width: 600px) {.grid-container {grid-template-columns: repeat(2, 1fr) !important}}
.grid-container img, .preview img {width: 100%; height: 100%; object-fit: contain}
"""

Shown = tuple[Image.Image, str]
"""A picture of a gallery and what stands below it."""


class Mistake(Exception):
    """What the page shows in one line."""


@dataclass(frozen=True)
class Page:
    """What the tabs do, without how they look. Every function is called by gradio, in a thread of its own."""

    service: Service

    def draw(
        self,
        prompt: str,
        count: float,
        seed: float | None,
        by_chance: bool,
        guidance: float,
        temperature: float,
        candidates: float,
        every: bool,
        sampler: Literal["flow", "student"],
        client: str,
    ) -> Iterator[tuple[list[Shown] | None, int, str]]:
        """Pictures (None where they are as they were), the seed that was used, and a line; first previews of them."""
        check_prompt(prompt)
        number, several = chosen_seed(seed, by_chance), int(candidates)
        asked = DrawRequest(prompt, int(count), number, guidance, temperature, several, None, 3, every, sampler)
        scheduler, pipeline = self.service.working()
        events: SimpleQueue[Event] = SimpleQueue()
        began, shown, timeout = time.perf_counter(), dict[int, list[Shown]](), self.service.limits.timeout
        if sampler == "student":
            calls, cost = student_calls(pipeline, asked), STUDENT_COST * several
            ticket = scheduler.call(calls, "pictures", cost, client, timeout, events.put)
        else:
            ticket = scheduler.draw(asked, client, timeout, events.put)
        for some in follow(ticket, events):
            for event in some:
                shown[event.index] = captions(event.result) if event.preview is None else [(event.preview, "preview")]
            yield gallery(shown) if some else None, asked.seed, f"{100 * ticket.progress:.0f} % drawn"
        seconds = time.perf_counter() - began
        ticket.future.result()
        yield gallery(shown), asked.seed, f"{int(count)} drawn in {seconds:.1f} s, the first with seed {asked.seed}"

    def choices(self, sampler: str) -> list[float]:
        """Guidance, temperature and candidates that the model, or its student, draws at by default."""
        pipeline = self.service.working()[1]
        student = pipeline.student if sampler == "student" else None
        own = with_sampling_options(pipeline.config, None, None, student.config if student else None)
        return [own_guidance(own, student), own.temperature, min(8, own.candidates)]

    def edit(
        self,
        editor: dict[str, Any] | None,
        way: str,
        prompt: str,
        source: str | None,
        strength: float,
        guidance: float,
        count: float,
        seed: float | None,
        by_chance: bool,
        client: str,
    ) -> Iterator[tuple[list[Shown] | None, int, str]]:
        """Changed pictures (None where they are as they were), the seed that was used, and a line."""
        source = source or ""  # gradio has None of a field that was never shown
        check_prompt(prompt)
        check_prompt(source)
        picture, mask = read_editor(editor)
        fill = way == FILL
        if fill and mask is None:
            raise Mistake("nothing is painted: paint over what shall be drawn anew")
        source_prompt, share, number = None if fill else source, 0.0 if fill else strength, chosen_seed(seed, by_chance)
        asked = EditRequest(picture, prompt, mask, source_prompt, int(count), number, guidance, share, previews=3)
        scheduler, pipeline = self.service.working()
        asked.check()
        events: SimpleQueue[Event] = SimpleQueue()
        calls = edit_calls(pipeline, asked, events.put)
        began, shown = time.perf_counter(), dict[int, list[Shown]]()
        ticket = scheduler.call(
            calls, "edit", asked.cost, client, self.service.limits.timeout, events.put, asked.places
        )
        for some in follow(ticket, events):
            for event in some:
                if event.preview is not None:
                    shown[event.index] = [(event.preview, "preview")]
                else:
                    made = event.result
                    shown[event.index] = [(made.images[0], f"log p {made.log_prob[0]:.0f}")]
            yield gallery(shown) if some else None, asked.seed, f"{100 * ticket.progress:.0f} % done"
        seconds = time.perf_counter() - began
        ticket.future.result()
        yield gallery(shown), asked.seed, f"{len(shown)} made in {seconds:.1f} s, the first with seed {asked.seed}"

    def judge(
        self, picture: Image.Image | None, prompts: str, draws: float, client: str
    ) -> Iterator[tuple[list[list[Any]] | None, list[Shown] | None, str]]:
        """A table of prompts, their heat maps over the picture, and a line that says which fits best; None before."""
        if picture is None:
            raise Mistake("there is no picture: upload one")
        each = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
        if len(each) > self.service.limits.prompts:
            raise Mistake(f"there are {len(each)} prompts, expected at most {self.service.limits.prompts}")
        for prompt in each:
            check_prompt(prompt)
        scheduler, pipeline = self.service.working()
        call = likelihood_call(pipeline, picture, each, 0, int(draws), heat=True)
        ticket = scheduler.call([call], "likelihood", len(each) * draws, client, self.service.limits.timeout)
        for _ in follow(ticket, SimpleQueue()):
            yield None, None, f"{100 * ticket.progress:.0f} % judged"
        found: list[PromptLikelihood] = ticket.future.result()[0]
        rows = [
            [
                one.prompt or "(no prompt)",
                round(one.found.nats, 1),
                round(one.found.bits_per_dim, 4),
                "" if one.found.standard_error is None else round(one.found.standard_error, 2),
            ]
            for one in found
        ]
        seen = seen_by(pipeline, picture)
        heat = [(seen, "what the model sees")]
        heat += [(over(seen, one.heat), one.prompt or "(no prompt)") for one in found]
        yield rows, heat, verdict(found)


FILL, CHANGE = "Fill what is painted", "Change by prompt"


def check_prompt(prompt: str) -> None:
    """Raises Mistake: a prompt that is too long."""
    if len(prompt) > LONGEST_PROMPT:
        raise Mistake(f"the prompt has {len(prompt)} characters, expected at most {LONGEST_PROMPT}")


def chosen_seed(seed: float | None, by_chance: bool) -> int:
    """The seed of a field, or a new one.

    Raises:
        Mistake: a field that holds no seed.
    """
    if by_chance:
        return secrets.randbelow(2**31)
    if seed is None or seed != int(seed) or not 0 <= seed < 2**53:
        raise Mistake(f"the seed is {seed}, expected a whole number of at least 0: or tick 'new seed'")
    return int(seed)


def captions(drawn: Drawn) -> list[Shown]:
    """A picture, or its candidates, the likeliest first, with their log p."""
    if drawn.log_prob is None:
        return [(drawn.image, f"seed {drawn.seed}")]
    return [(image, f"log p {nats:.0f}") for image, nats in drawn.candidates or ((drawn.image, drawn.log_prob),)]


def gallery(shown: dict[int, list[Shown]]) -> list[Shown]:
    """All pictures in order."""
    return [one for index in sorted(shown) for one in shown[index]]


def over(picture: Image.Image, heat: Image.Image | None) -> Image.Image:
    """A heat map laid over a picture in grey."""
    assert heat is not None
    return Image.blend(picture.convert("L").convert("RGB"), heat.resize(picture.size), 0.55)


def verdict(found: list[PromptLikelihood]) -> str:
    """Which prompt fits best, and by how much."""
    order = sorted(found, key=lambda one: -one.found.nats)
    best = order[0].found
    line = f"{best.nats:.1f} nats, {best.bits_per_dim:.4f} bits/dim of the {best.space}"
    if len(order) == 1:
        return line
    difference, error = best.minus(order[1].found.values)
    sure = "" if error is None else f" ± {error:.1f}"
    return f"'{order[0].prompt}' fits best, by {difference:.1f}{sure} nats before '{order[1].prompt}'"


def read_editor(editor: dict[str, Any] | None) -> tuple[Image.Image, Image.Image | None]:
    """The picture of gradio's editor, and a mask that is white where it was painted; None where nothing was.

    Painted strokes come as layers, and where a layer is missing as the difference of the whole to the background.

    Raises:
        Mistake: no picture.
    """
    background = None if editor is None else editor.get("background")
    if editor is None or background is None:
        raise Mistake("there is no picture: upload one")
    painted = Image.new("L", background.size)
    for layer in editor.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size, Image.Resampling.NEAREST)
        painted = ImageChops.lighter(painted, alpha)
    if painted.getbbox() is None and editor.get("composite") is not None:
        whole = editor["composite"].convert("RGB").resize(background.size, Image.Resampling.NEAREST)
        painted = ImageChops.difference(whole, background.convert("RGB")).convert("L")
    mask = painted.point(lambda level: 255 if level > 8 else 0)
    return background, None if mask.getbbox() is None else mask


def told(error: Exception) -> Any:
    """What the page shows of an error: one line."""
    import gradio as gr

    if isinstance(error, Mistake) or failure_of(error) is not None:
        return gr.Error(" ".join(str(error).split())[:300], print_exception=False)
    LOGGER.error("the page failed", exc_info=error)
    return gr.Error("the service failed: its log says why", print_exception=False)


def updates(steps: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
    """What the parts of a tab become, step by step, None staying as it is; errors as the page shows them."""
    import gradio as gr

    try:
        for step in steps:
            yield tuple(gr.skip() if one is None else one for one in step)
    except Exception as error:  # noqa: BLE001  # every error is shown
        raise told(error) from None


def seed_row() -> tuple[Any, Any]:
    """The field of a seed, and whether a new one is drawn."""
    import gradio as gr

    with gr.Row():
        number = gr.Number(0, label="Seed", precision=0, min_width=100)
        return number, gr.Checkbox(True, label="New seed", min_width=100)


def create_tab(page: Page) -> list[Any]:
    """Prompts to pictures; returns what is set when the model is there."""
    import gradio as gr

    def draw(
        prompt: str, count: float, seed: float, new: bool, w: float, t: float, k: float, each: bool, by: Any,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        yield from updates(page.draw(prompt, count, seed, new, w, t, k, each, by or "flow", str(request.session_hash)))

    with gr.Row():
        with gr.Column(min_width=300):
            prompt = gr.Textbox(label="Prompt", placeholder="what the picture shows", max_lines=3)
            examples = gr.Dataset(label="Examples", components=[prompt], samples=[["..."]], samples_per_page=6)
            count = gr.Slider(1, 16, 4, step=1, label="Pictures")
            seed, new = seed_row()
            with gr.Accordion("More", open=False):
                guidance = gr.Slider(0, 10, 0, step=0.1, label="Guidance", info="0 is unguided")
                temperature = gr.Slider(0.1, 1.5, 1, step=0.05, label="Temperature", info="under 1 is simpler")
                candidates = gr.Slider(1, 8, 1, step=1, label="Candidates", info="the likeliest is kept")
                every = gr.Checkbox(False, label="Show every candidate")
            sampler = gr.Radio(SAMPLERS, value="flow", label="Drawn by", visible=False)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(min_width=300):
            pictures = gr.Gallery(label="Pictures", format="png", columns=3, height=480, object_fit="contain")
            line = gr.Markdown()
    inputs = [prompt, count, seed, new, guidance, temperature, candidates, every, sampler]
    gr.on([button.click, prompt.submit], draw, inputs, [pictures, seed, line], show_progress="hidden")
    examples.click(lambda sample: sample[0], examples, prompt)
    sampler.input(page.choices, sampler, [guidance, temperature, candidates])
    return [examples, guidance, temperature, candidates, sampler]


def edit_tab(page: Page) -> Any:
    """Pictures to changed ones."""
    import gradio as gr

    def edit(
        editor: Any,
        way: str,
        prompt: str,
        source: str | None,
        strength: float,
        w: float,
        count: float,
        seed: float,
        new: bool,
        request: gr.Request,
    ) -> Iterator[Any]:
        session = str(request.session_hash)
        yield from updates(page.edit(editor, way, prompt, source, strength, w, count, seed, new, session))

    with gr.Row():
        with gr.Column(min_width=300):
            editor = gr.ImageEditor(
                label="Picture",
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=SOURCES,
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=6, colors=["#ff00ff"], color_mode="fixed"),
                height=420,
                elem_id="edited-picture",
            )
            way = gr.Radio([FILL, CHANGE], value=FILL, label="What to do")
            prompt = gr.Textbox(label="New prompt", placeholder="what the whole picture shall show")
            source = gr.Textbox(label="Source prompt", placeholder="what it shows now", visible=False)
            strength = gr.Slider(0, 1, 0.5, step=0.05, label="Strength", info="1 is a new picture", visible=False)
            guidance = gr.Slider(0, 10, 0, step=0.1, label="Guidance", info="0 is unguided")
            count = gr.Slider(1, 8, 2, step=1, label="Pictures")
            seed, new = seed_row()
            button = gr.Button("Edit", variant="primary")
        with gr.Column(min_width=300):
            edited = gr.Gallery(label="Edited", format="png", columns=2, height=480, object_fit="contain")
            line = gr.Markdown()

    def changed_way(chosen: str) -> list[Any]:
        """A hole is filled at the model's own guidance; a change begins unguided, as its encoding is."""
        weight = 0.0 if chosen == CHANGE else page.service.working()[1].config.guidance
        return [*[gr.update(visible=chosen == CHANGE)] * 2, weight]

    way.change(changed_way, way, [source, strength, guidance])
    inputs = [editor, way, prompt, source, strength, guidance, count, seed, new]
    button.click(edit, inputs, [edited, seed, line], show_progress="hidden")
    return guidance


def likelihood_tab(page: Page) -> None:
    """Pictures to numbers."""
    import gradio as gr

    def judge(picture: Any, prompts: str, draws: float, request: gr.Request) -> Iterator[Any]:
        yield from updates(page.judge(picture, prompts, draws, str(request.session_hash)))

    with gr.Row():
        with gr.Column(min_width=300):
            picture = gr.Image(
                label="Picture",
                type="pil",
                image_mode="RGBA",
                format="png",
                sources=SOURCES,
                height=320,
                elem_id="judged-picture",
            )
            prompts = gr.Textbox(label="Prompts, one a line", lines=4)
            draws = gr.Slider(1, 16, 4, step=1, label="Draws of the noise")
            button = gr.Button("Judge", variant="primary")
        with gr.Column(min_width=300):
            best = gr.Markdown()
            table = gr.Dataframe(headers=["prompt", "nats", "bits/dim", "± nats"], interactive=False)
            heat = gr.Gallery(
                label="Where it is unlikely: red", format="png", columns=3, height=420, object_fit="contain"
            )
    button.click(judge, [picture, prompts, draws], [table, heat, best], show_progress="hidden")


def build(service: Service) -> Any:
    """The page as gradio's blocks."""
    import gradio as gr

    page = Page(service)
    with gr.Blocks(title="starflow", analytics_enabled=False) as blocks:
        heading = gr.Markdown("## starflow\nThe model is being loaded.")
        with gr.Tab("Create"):
            chosen = create_tab(page)
        with gr.Tab("Edit"):
            edit_guidance = edit_tab(page)
        with gr.Tab("Likelihood"):
            likelihood_tab(page)

        def opened() -> Any:
            """The model's own choices, when it is there."""
            service.loaded.wait(LOAD_SECONDS)
            try:
                _, pipeline = service.working()
            except Exception as error:  # noqa: BLE001
                raise told(service.failure or error) from None
            width, height = default_size(pipeline.config, pipeline.flow.config)
            samples = [[one] for one in example_prompts(pipeline.conditioner, 6)]
            said = f"## starflow\n'{service.name}' draws {width}x{height} pixels and knows how likely a picture is."
            sampler = gr.update(visible=pipeline.student is not None)
            return [said, gr.Dataset(samples=samples), *page.choices("flow"), sampler, pipeline.config.guidance]

        blocks.load(opened, None, [heading, *chosen, edit_guidance])
    return blocks.queue(default_concurrency_limit=16)


def add_page(app: "FastAPI", service: Service) -> "FastAPI":
    """The application with the page at its root."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build(service),
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=False,
        max_file_size=service.limits.body,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
    )
    return mounted
