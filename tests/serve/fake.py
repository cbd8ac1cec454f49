"""A sampler that computes nothing and remembers what it was asked, and a clock that stands until it is set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from starflow.errors import UserError
from starflow.serve.queue import BatchKey, Drawn, DrawRequest, PictureInProgress, Row
from starflow.serve.scheduler import Observer

TOKENS = 4


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeSampler:
    """Four blocks, 8 rows at once. Prompts choose what goes wrong: "bad prompt", "bad block", "bad picture"."""

    blocks = 4

    def __init__(self, clock: Clock | None = None, seconds: float = 1.0) -> None:
        self.batches: list[tuple[int, list[str]]] = []
        self.clock, self.seconds = clock, seconds
        self.before: Callable[[int], None] = lambda block: None

    def begin(self, request: DrawRequest, index: int) -> PictureInProgress:
        if request.guidance is not None and request.guidance < 0:
            raise UserError("guidance is below 0")
        key = ((1, 2, 2), bool(request.guidance))
        rows = [Row(self.blocks - 1) for _ in range(request.candidates or 1)]
        return PictureInProgress(request, request.seed + index, key, TOKENS, request.guidance or 0.0, 1.0, rows)

    def capacity(self, key: BatchKey) -> int:
        return 8

    def prepare(self, drawings: Sequence[PictureInProgress]) -> None:
        for drawing in drawings:
            if drawing.request.prompt == "bad prompt":
                raise UserError("no such prompt")
            drawing.prepared = True

    def solve(self, rows: Sequence[tuple[PictureInProgress, Row]], progress: Callable[[int], None]) -> None:
        block = rows[0][1].block
        assert len(rows) <= 8
        assert all(row.block == block and drawing.key == rows[0][0].key for drawing, row in rows)
        self.batches.append((block, [drawing.request.prompt for drawing, _ in rows]))
        self.before(block)
        if any(drawing.request.prompt == "bad block" for drawing, _ in rows):
            raise RuntimeError("out of memory")
        for _ in range(TOKENS):
            progress(1)
        if self.clock is not None:
            self.clock.now += self.seconds
        for _, row in rows:
            row.block -= 1

    def preview(self, drawing: PictureInProgress) -> Image.Image:
        drawing.previewed += 1
        return Image.new("RGB", (1, 1), (drawing.previewed, 0, 0))

    def finish(self, drawings: Sequence[PictureInProgress]) -> list[Drawn | Exception]:
        return [
            ValueError("not finite")
            if drawing.request.prompt == "bad picture"
            else Drawn(Image.new("RGB", (1, 1)), drawing.seed, torch.zeros(1))
            for drawing in drawings
        ]


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.outcomes: list[tuple[str, str, int]] = []
        self.stages: list[tuple[str, int, float]] = []

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def worked(self, stage: str, rows: int, seconds: float) -> None:
        self.stages.append((stage, rows, seconds))

    def ended(self, kind: str, outcome: str, parts: int) -> None:
        self.outcomes.append((kind, outcome, parts))
