"""All views of all models of the furniture catalogues, as files, and what their captions say.

Contract: a model whose views are there is not drawn again. Beside them lies `views.json`, written last: the
pictures' size, and for every view its number, side and colour, or why there is none.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from starflow.data.sets.glyphs import captions
from starflow.data.sets.glyphs2.drawings import Drawing, Drawn, is_whole
from starflow.data.sets.glyphs2.furniture import Catalogue, Piece
from starflow.data.sets.glyphs2.models import SIDES, BadModel, draw_model
from starflow.data.sets.glyphs2.words import concept_key
from starflow.errors import UserError
from starflow.io.files import write_bytes, write_json

NOTES = "views.json"
# Sides from which a thing is usually shown: a caption need not say them.
USUAL = frozenset({"from the front right", "from the front left", "from above"})

Task = tuple[Piece, dict[str, bytes], Path]


def model_views(
    catalogues: list[Catalogue], images: Path, *, size: int, workers: int, progress: bool
) -> Iterator[Drawing | tuple[str, str]]:
    """Draw what is missing below `images`; the views, or (model, why there are none), in the catalogues' order.

    Raises:
        UserError: VTK is not installed, or broke down.
    """
    if importlib.util.find_spec("vtkmodules") is None:
        raise UserError(
            "drawing the views of models needs the package vtk, which is not installed: "
            "pip install 'starflow[models]', or leave them out with --model-views leave-out"
        )
    from tqdm import tqdm

    pieces = [(c, piece) for c in catalogues for piece in c.pieces() if not isinstance(piece, tuple)]
    missing = [(c, piece) for c, piece in pieces if not _is_drawn(images / "model" / piece.key, size)]
    tasks = ((piece, catalogue.model_files(piece), images / "model" / piece.key) for catalogue, piece in missing)
    done = _draw(tasks, size, workers)
    for _ in tqdm(done, total=len(missing), desc="models", unit="model", disable=not progress):
        pass
    for _, piece in pieces:
        yield from _views_of(piece, _notes(images / "model" / piece.key))


def _draw(tasks: Iterator[Task], size: int, workers: int) -> Iterator[None]:
    """Draw models, in any order, in other processes if there are several workers."""
    if workers <= 1:
        yield from map(partial(_draw_one, size=size), tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = []
        try:
            for task in tasks:  # few at a time: a model's files take some megabytes
                waiting.append(pool.submit(_draw_one, task, size))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a process that draws models broke down: run the command again, it goes on") from None


def _draw_one(task: Task, size: int) -> None:
    """Draw a model's views to their files, then its notes; runs in a worker."""
    piece, files, folder = task
    views: list[dict[str, Any]] = []
    reason = ""
    try:
        for view in draw_model(files, PurePosixPath(piece.model).name, piece.rotation, piece.key, size):
            write_bytes(folder / f"{view.number:02d}.png", view.png)
            views.append({"number": view.number, "side": SIDES.index(view.side), "colour": view.colour})
    except BadModel as error:
        reason = str(error)
    write_json(folder / NOTES, {"size": size, "views": views, "reason": reason})


def _is_drawn(folder: Path, size: int) -> bool:
    notes = _notes(folder)
    return notes["size"] == size and all(
        is_whole(folder / f"{view['number']:02d}.png", size) for view in notes["views"]
    )


def _notes(folder: Path) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"size": 0, "views": [], "reason": "it was not drawn"}
    return notes


def _views_of(piece: Piece, notes: dict[str, Any]) -> Iterator[Drawing | tuple[str, str]]:
    if not notes["views"]:
        yield f"model/{piece.key}", notes["reason"]
    for view in notes["views"]:
        side, colour = SIDES[view["side"]], view["colour"]
        extra = {"creator": piece.creator, "view": side.caption, "model": piece.key}
        if side.caption in USUAL:
            extra["say_view"] = "sometimes"
        if colour:
            extra["paint"] = colour
        yield Drawing(
            name=f"model/{piece.key}/{view['number']:02d}",
            caption=captions.recoloured(piece.name, colour) if colour else piece.name,
            style="model",
            concept=concept_key(piece.name),
            kind=piece.kind.lower(),
            art=Drawn(),
            tags=piece.tags,
            flip=side.mirrors,
            extra=extra,
        )
