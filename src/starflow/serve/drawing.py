"""The model's side of serving: pictures are taken through the flow block by block, in batches that change in between.

Contract: picture i of a request is what a pipeline draws for it alone: its condition and noise are its own, candidates
are judged apart from others', and the compiled loop, which is built before the first picture, computes every row by
itself. The flow's part is the same bit for bit, pixels within one 8-bit level. One thread may call a `BlockSampler`.

Shapes: B rows of a batch, each a candidate of a picture; C x h x w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.data.images import from_pil, on_background, to_pil
from starflow.edit.inpainting import InpaintSettings
from starflow.errors import UserError
from starflow.flow.finite import NotFiniteError, broken_rows
from starflow.pipeline.config import (
    default_size,
    guidance_weights,
    latent_shape,
    own_guidance,
    untrained_size_warning,
    with_sampling_options,
)
from starflow.pipeline.editing import Edited, hole_of
from starflow.pipeline.inputs import (
    PromptConditions,
    call_bytes,
    check_seed,
    check_student_call,
    check_whole,
    free_bytes,
)
from starflow.pipeline.likelihood import LogProb
from starflow.pipeline.pipeline import BATCH, StarFlowPipeline
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import candidate_noise, sample_block
from starflow.serve.queue import BatchKey, Drawn, DrawRequest, Event, Listener, PictureInProgress, Progress, Row

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS_KEPT = 256
"""Conditions of recent prompts that are kept."""

MEMORY_SHARE = 0.8
"""Of the memory that is free when a sampler is made: what batches may take."""


@dataclass
class BlockSampler:
    """Takes pictures through the flow of a pipeline, one block of one batch at a time."""

    pipeline: StarFlowPipeline
    max_rows: int = BATCH
    """Rows of a batch, at most; memory may allow fewer."""
    memory: int | None = None
    """Bytes that a batch may take beside the weights; None is a share of what is free."""
    _conditions: PromptConditions = field(init=False)
    _capacities: dict[BatchKey, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("max_rows", self.max_rows)
        pipeline = self.pipeline
        if self.memory is None and (free := free_bytes(pipeline.device)) is not None:
            self.memory = int(MEMORY_SHARE * free)
        self._conditions = PromptConditions(pipeline.conditioner, pipeline.flow, pipeline.config, PROMPTS_KEPT)
        self._engine = cpu_engine_of(pipeline.flow) if pipeline.device.type == "cpu" else None

    @property
    def blocks(self) -> int:
        """Blocks of the flow."""
        return len(self.pipeline.flow.blocks)

    def warm_up(self) -> None:
        """Build what is built once, and draw a picture: from here on nothing changes how one is computed."""
        if self._engine is not None:
            self._engine.build()
        self._conditions.try_together()
        drawing = self.begin(DrawRequest(candidates=1, guidance=0.0), 0)
        self.prepare([drawing])
        while not drawing.finished:
            self.solve([(drawing, row) for row in drawing.rows], lambda _: None)
        self.finish([drawing])

    def begin(self, request: DrawRequest, index: int) -> PictureInProgress:
        """Picture `index` of a request, checked, before anything is computed for it.

        Raises:
            UserError: what the model cannot draw, or has not the memory for.
        """
        pipeline = self.pipeline
        config = with_sampling_options(pipeline.config, request.temperature, request.candidates)
        guidance = config.guidance if request.guidance is None else request.guidance
        if not (guidance >= 0 and math.isfinite(guidance)):
            raise UserError(f"guidance is {guidance}, expected at least 0 (0 is unguided)")
        shape = latent_shape(config, pipeline.flow.config, request.size)
        seed = check_seed(request.seed, index + 1) + index
        key = (shape, guidance > 0)
        if not self.capacity(key):
            raise UserError(f"a picture of {request.size} needs more memory than there is: ask for a smaller size")
        rows = [Row(self.blocks - 1) for _ in range(config.candidates)]
        tokens = shape[1] * shape[2] // pipeline.flow.config.patch_size**2
        notes = _size_notes(pipeline, request)
        return PictureInProgress(request, seed, key, tokens, guidance, config.temperature, rows, notes=notes)

    def capacity(self, key: BatchKey) -> int:
        """Rows that a batch may have: as many as are predicted to fit."""
        if key not in self._capacities:
            decoder = (self.pipeline.decoder or self.pipeline.autoencoder).spec
            rows = self.max_rows
            while rows and self.memory is not None:
                if call_bytes(self.pipeline.flow, key[0], rows, "network", decoder, None) <= self.memory:
                    break
                rows //= 2
            self._capacities[key] = rows
        return self._capacities[key]

    def prepare(self, drawings: Sequence[PictureInProgress]) -> None:
        """Encode the prompts and draw the noise of pictures of one key that have not begun.

        Raises:
            UserError: a prompt that the model does not know.
        """
        shape = drawings[0].key[0]
        self._conditions.prepare([drawing.request.prompt for drawing in drawings], shape)
        for drawing in drawings:
            drawing.condition, drawing.null_condition = self._encode(drawing.request.prompt, shape)
            noise = candidate_noise([drawing.seed], shape, len(drawing.rows))[0]
            states = (drawing.temperature * noise.to(self.pipeline.device)).split(1)
            for row, state in zip(drawing.rows, states, strict=True):
                row.state = state
            drawing.prepared = True

    def _encode(self, prompt: str, shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Condition and null condition of one prompt: they do not depend on who is beside it."""
        return self._conditions.of(prompt, shape)

    def solve(self, rows: Sequence[tuple[PictureInProgress, Row]], progress: Callable[[int], None]) -> None:
        """Take rows of one key through the block that all of them are at; `progress` is told of the tokens solved."""
        drawings = [drawing for drawing, _ in rows]
        block = rows[0][1].block
        weights = torch.tensor([drawing.guidance for drawing in drawings], dtype=torch.float64, device="cpu")
        solved = sample_block(
            self.pipeline.flow,
            block,
            torch.cat([row.state for _, row in rows if row.state is not None]),
            _stack([drawing.condition for drawing in drawings]),
            _stack([drawing.null_condition for drawing in drawings]),
            SampleSettings(weights, "auto"),
            self._engine,
            progress,
        )
        for (_, row), state in zip(rows, solved.split(1), strict=True):
            row.state, row.block = state.clone(), block - 1

    def preview(self, drawing: PictureInProgress) -> Image:
        """The decoder's picture of what is solved so far of the first candidate."""
        state = drawing.rows[0].state
        assert state is not None
        drawing.previewed += 1
        return to_pil(self.pipeline._decode(state, keep=True).nan_to_num(nan=0.0))[0]

    def finish(self, drawings: Sequence[PictureInProgress]) -> list[Drawn | Exception]:
        """Pictures of drawings that have been through all blocks, or what went wrong with each."""
        chosen: list[tuple[PictureInProgress, Tensor, list[float]] | Exception] = []
        for drawing in drawings:
            try:
                chosen.append((drawing, *self._chosen(drawing)))
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this picture's alone
                chosen.append(error)
        made: dict[int, Drawn | Exception] = {}
        places = [place for place, one in enumerate(chosen) if not isinstance(one, Exception)]
        for key in {drawings[place].key for place in places}:
            self._decode([place for place in places if drawings[place].key == key], chosen, made)
        return [one if isinstance(one, Exception) else made[place] for place, one in enumerate(chosen)]

    def _chosen(self, drawing: PictureInProgress) -> tuple[Tensor, list[float]]:
        """Latents (B, C, h, w) of the candidates that become pictures, the likeliest first, and their log p."""
        latents = torch.cat([row.state for row in drawing.rows if row.state is not None])
        broken = broken_rows(latents)
        if len(broken) == len(latents):
            raise NotFiniteError(f"the picture came out not finite: guidance is {drawing.guidance:g}, lower it")
        if len(latents) == 1:
            return latents, []
        scores = []
        with torch.no_grad():
            for part in latents.split(BATCH):  # the batches of a pipeline, so that rounding is the same
                given = _stack([drawing.condition] * len(part))
                scores.append(self.pipeline.flow.log_prob(part, given))
        nats = torch.cat(scores).nan_to_num(nan=-math.inf)
        nats[broken] = -math.inf
        order = nats.argsort(descending=True, stable=True)
        order = order[: len(latents) - len(broken)] if drawing.request.keep_candidates else nats.argmax().view(1)
        return latents[order], nats[order].tolist()

    def _decode(
        self,
        places: Sequence[int],
        chosen: Sequence[tuple[PictureInProgress, Tensor, list[float]] | Exception],
        made: dict[int, Drawn | Exception],
    ) -> None:
        """Decode pictures of one size together, and one by one where that fails."""
        picked = [one for place in places if not isinstance(one := chosen[place], Exception)]
        try:
            latents = torch.cat([latents for _, latents, _ in picked])
            conditions = [drawing.condition for drawing, own, _ in picked for _ in range(len(own))]
            images = self._pictures(latents, _stack(conditions))
        except Exception as error:  # noqa: BLE001
            if len(places) == 1:
                made[places[0]] = error
            else:
                for place in places:
                    self._decode([place], chosen, made)
            return
        start = 0
        for place, (drawing, own, nats) in zip(places, picked, strict=True):
            mine = images[start : start + len(own)]
            start += len(own)
            made[place] = _drawn(drawing, own, nats, mine)

    def _pictures(self, latents: Tensor, condition: Tensor | None) -> list[Image | None]:
        """The cleaned picture of each latent, None where it is not finite; in batches that fit."""
        pipeline = self.pipeline
        cleaning = pipeline._cleaning(None)
        images: list[Image | None] = []
        for start in range(0, len(latents), self.max_rows):
            some = slice(start, start + self.max_rows)
            given = None if condition is None else condition[some]
            decoded = pipeline._decode_clean(latents[some], given, cleaning, keep=True)
            broken = set(broken_rows(decoded))
            made = to_pil(decoded.nan_to_num(nan=0.0))
            images += [None if row in broken else image for row, image in enumerate(made)]
        return images


def _drawn(
    drawing: PictureInProgress, latents: Tensor, nats: list[float], images: list[Image | None]
) -> Drawn | Exception:
    first = images[0]
    if first is None:
        return NotFiniteError("the picture was decoded to values that are not finite: use another decoder")
    pairs = zip(images, nats, strict=True) if drawing.request.keep_candidates and nats else ()
    candidates = tuple((image, value) for image, value in pairs if image is not None)
    return Drawn(first, drawing.seed, latents[:1], nats[0] if nats else None, candidates, drawing.notes)


def _size_notes(pipeline: StarFlowPipeline, request: DrawRequest) -> list[str]:
    note = request.size and untrained_size_warning(pipeline.config, pipeline.flow.config, request.size)
    return [note] if note else []


def _stack(conditions: Sequence[Tensor | None]) -> Tensor | None:
    """One-row conditions as a batch; None where there are none."""
    given = [one for one in conditions if one is not None]
    return torch.cat(given) if given else None


@dataclass(frozen=True)
class PromptLikelihood:
    """How likely a picture is under one prompt."""

    prompt: str
    found: LogProb
    heat: Image | None
    """Bits/dim of every token as a picture of the size that the model sees, on one scale for all prompts."""


def likelihood_call(
    pipeline: StarFlowPipeline, image: Image, prompts: Sequence[str], seed: int, draws: int, *, heat: bool
) -> Callable[[Progress], list[PromptLikelihood]]:
    """What finds a picture's likelihood under each prompt, all under the same noise.

    The model sees the picture's centre at its own size.
    """

    def run(progress: Progress) -> list[PromptLikelihood]:
        found: list[LogProb] = []
        maps: list[Tensor] = []
        seen, seeds, parts = seen_by(pipeline, image), range(seed, seed + draws), len(prompts) * draws * (1 + heat)
        for prompt in prompts:
            each = []
            for one in seeds:  # one by one, as the model is lent to others in between
                each.append(pipeline.log_prob(seen, prompt, seed=one))
                progress(len(found) * draws * (1 + heat) + len(each), parts)
            nats = torch.tensor([one.nats for one in each], dtype=torch.float64, device="cpu")
            found.append(LogProb.mean_of(nats, each[0].dimensions, each[0].space))
            if heat:
                maps.append(_bits_map(pipeline, seen, prompt, seeds, lambda: progress(len(found) * draws * 2, parts)))
        pictures = _heat_pictures(maps, seen.size) if heat else [None] * len(prompts)
        return [PromptLikelihood(*one) for one in zip(prompts, found, pictures, strict=True)]

    return run


def seen_by(pipeline: StarFlowPipeline, image: Image) -> Image:
    """A picture as the model sees it whole: RGB, its centre, at the model's own size."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    size = default_size(pipeline.config, pipeline.flow.config)
    return ImageOps.fit(on_background(image), size, Pillow.Resampling.LANCZOS)


def _bits_map(
    pipeline: StarFlowPipeline, seen: Image, prompt: str, seeds: Sequence[int], lend: Callable[[], None]
) -> Tensor:
    """Bits/dim of each token (h, w), the mean over the draws."""
    given, flow = from_pil(seen).to(pipeline.device), pipeline.flow.config
    maps = []
    for seed in seeds:
        maps.append(pipeline.log_prob_maps(given, [prompt], [seed])[0])
        lend()
    return (-torch.stack(maps).mean(0) / (flow.in_channels * flow.patch_size**2 * math.log(2))).cpu()


def _heat_pictures(maps: Sequence[Tensor], size: tuple[int, int]) -> list[Image | None]:
    from starflow.evaluate.render import heatmap

    low, high = float(min(one.min() for one in maps)), float(max(one.max() for one in maps))
    return [heatmap(one, size, low, high) for one in maps]


@dataclass(frozen=True)
class EditRequest:
    """A picture to be changed: with a source prompt by way of the flow's noise, else by filling a hole."""

    image: Image
    prompt: str
    mask: Image | None = None
    source_prompt: str | None = None
    num_images: int = 1
    seed: int = 0
    guidance: float | None = None
    """None is unguided, or where a hole is filled what the model draws at; so is the temperature, of filling alone."""
    strength: float = 0.0
    invert_mask: bool = False
    temperature: float | None = None
    settings: InpaintSettings = field(default_factory=InpaintSettings)
    """Of filling a hole, guidance and temperature aside."""
    previews: int = 0
    """Of a filling on its way, at most."""

    def check(self) -> None:
        """Raises UserError: a mask that repaints nothing, or none where one is needed."""
        if self.source_prompt is None or self.mask is not None:
            hole_of(self.image, self.mask, None, invert=self.invert_mask)

    @property
    def places(self) -> int:
        """Of the queue that one picture takes: one, and one for every quarter of a million pixels that wait with it."""
        return 1 + self.image.width * self.image.height // 2**18

    @property
    def cost(self) -> float:
        """Of one picture, in about the rows that would be drawn in the same time."""
        steps = 0 if self.settings.method in ("auto", "resample") else self.settings.steps
        return 3.0 if self.source_prompt is not None else 2.0 * (self.settings.candidates + steps)


def edit_calls(
    pipeline: StarFlowPipeline, request: EditRequest, listener: Listener | None = None
) -> list[Callable[[Progress], Edited]]:
    """What makes each picture of a request; they do not depend on each other. The listener is told of previews.

    Raises:
        UserError: a seed that no generator takes.
    """

    def make(index: int, progress: Progress) -> Edited:
        seed, share, shown = request.seed + index, 0.0, 0

        def told(done: int, total: int) -> None:
            nonlocal share
            share = done / max(1, total)
            progress(done, total)

        def preview(_: int, picture: Image) -> None:
            nonlocal shown
            if listener is not None and shown < request.previews and share >= (shown + 1) / (request.previews + 1):
                shown += 1
                listener(Event(index, preview=picture))

        if request.source_prompt is not None:
            return pipeline.edit(
                request.image,
                request.source_prompt,
                request.prompt,
                request.strength,
                mask=request.mask,
                invert_mask=request.invert_mask,
                seed=seed,
                guidance=request.guidance or 0.0,
                progress=progress,
            )
        return pipeline.inpaint(
            request.image,
            request.mask,
            request.prompt,
            method=request.settings.method,
            seed=seed,
            invert_mask=request.invert_mask,
            guidance=request.guidance,
            temperature=request.temperature,
            candidates=request.settings.candidates,
            steps=request.settings.steps,
            progress=told,
            preview=preview if request.previews else None,
        )

    check_seed(request.seed, request.num_images)
    return [partial(make, index) for index in range(request.num_images)]


def student_calls(pipeline: StarFlowPipeline, request: DrawRequest) -> list[Callable[[Progress], Drawn]]:
    """What draws each picture of a request by the model's student, in one pass each and alone.

    Raises:
        UserError: no student, or what it cannot draw.
    """
    guidance = own_guidance(pipeline.config, pipeline.student) if request.guidance is None else request.guidance
    settings, weights = SampleSettings(guidance, "auto"), guidance_weights(guidance, request.num_images)
    check_student_call("student", pipeline.student, pipeline.config.name, settings, None, weights)
    with_sampling_options(pipeline.config, request.temperature, request.candidates)
    latent_shape(pipeline.config, pipeline.flow.config, request.size)
    check_seed(request.seed, request.num_images)

    def make(seed: int, progress: Progress) -> Drawn:
        made = pipeline(
            request.prompt,
            seed=seed,
            sampler="student",
            guidance=guidance,
            temperature=request.temperature,
            candidates=request.candidates,
            size=request.size,
            progress=progress,
        )
        return Drawn(made.images[0], seed, made.latents, notes=_size_notes(pipeline, request))

    return [partial(make, request.seed + index) for index in range(request.num_images)]
