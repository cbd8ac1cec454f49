"""Reports and numbers are drawn: heat maps, contact sheets of images with captions, a table, and a page with both."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starflow.data.images import save_png, to_pil
from starflow.errors import UserError
from starflow.evaluate.judge import JudgeReport
from starflow.evaluate.report import EvaluationReport

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont


COLOUR_STOPS = (0.0, 0.5, 1.0)
"""Positions of the colours: blue is low, white the middle, red high."""

COLOURS = ((-0.74, -0.42, 0.24), (0.96, 0.96, 0.96), (0.4, -0.8, -0.66))
"""In [-1, 1], red, green and blue; the scale stays readable in grey."""


def heat_colours(values: Tensor, low: float, high: float) -> Tensor:
    """(h, w) to a picture (3, h, w) in [-1, 1]; values outside low .. high take the end's colour, NaN is black."""
    place = ((values.double() - low) / (high - low if high > low else 1.0)).clamp(0, 1)
    points = torch.tensor(COLOURS, dtype=torch.float64, device="cpu")
    upper = place > COLOUR_STOPS[1]
    share = torch.where(upper, (place - COLOUR_STOPS[1]) / COLOUR_STOPS[1], place / COLOUR_STOPS[1])[..., None]
    found = torch.where(
        upper[..., None], points[1] + share * (points[2] - points[1]), points[0] + share * (points[1] - points[0])
    )
    return found.nan_to_num(-1.0).permute(2, 0, 1).float()


def heatmap(values: Tensor, size: tuple[int, int], low: float, high: float) -> Image:
    """(h, w) numbers as an RGB picture of `size` (width, height), cells without smoothing.

    Raises:
        UserError: not a plane of numbers.
    """
    from PIL.Image import Resampling

    if values.ndim != 2 or not values.numel():
        raise UserError(f"a heat map needs values (h, w), got shape {tuple(values.shape)}")
    return to_pil(heat_colours(values, low, high)[None])[0].resize(size, Resampling.NEAREST)


def save_heatmap(path: Path, values: Tensor, size: tuple[int, int], low: float, high: float, unit: str) -> None:
    """Write `heatmap` as a PNG whose text says what the ends of its scale are."""
    text = {"low": f"{low:.6g} {unit}", "high": f"{high:.6g} {unit}"}
    save_png(heatmap(values, size, low, high), path, text)


GAP = 8
"""Pixels between the images of a sheet."""

CAPTION_LINES = 2


def contact_sheet(images: Sequence[Image], captions: Sequence[str], columns: int, side: int = 128) -> Image:
    """Pictures in rows of `columns`, each fitted into `side` x `side` pixels with its caption below.

    A caption takes up to two lines; what does not fit ends in an ellipsis. Small pictures are enlarged without
    smoothing, so that pixels stay visible.

    Raises:
        UserError: no pictures, not one caption a picture, or no columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images or len(images) != len(captions) or columns < 1 or side < 1:
        raise UserError(
            f"{len(images)} pictures with {len(captions)} captions in {columns} columns of {side} pixels: "
            "expected at least one of each, and one caption a picture"
        )
    font = ImageFont.load_default(size=max(9, side // 11))
    line = math.ceil(font.getbbox("Ag")[3]) + 2
    width, height = side + GAP, side + CAPTION_LINES * line + GAP
    canvas = Image.new("RGB", (columns * width + GAP, math.ceil(len(images) / columns) * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + index % columns * width, GAP + index // columns * height
        fitted = _fit(image, side)
        canvas.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
        for row, text in enumerate(_wrap(caption, side, pen, font)):
            pen.text((left + side / 2, top + side + row * line), text, fill="black", font=font, anchor="ma")
    return canvas


def save_contact_sheet(
    path: Path, images: Sequence[Image], captions: Sequence[str], columns: int, side: int = 128
) -> None:
    """Write `contact_sheet` as a PNG, whole or not at all.

    Raises:
        UserError: see `contact_sheet`, or the file cannot be written.
    """
    save_png(contact_sheet(images, captions, columns, side), path)


def _fit(image: Image, side: int) -> Image:
    from PIL.Image import Resampling

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Resampling.NEAREST if scale > 1 else Resampling.LANCZOS)


def _wrap(caption: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> list[str]:
    """The caption in at most LINES lines of `width` pixels; the last takes the rest, shortened."""
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == CAPTION_LINES or pen.textlength(longer, font=font) <= width):
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(text, width, pen, font) for text in lines]


def _shorten(text: str, width: int, pen: ImageDraw, font: FreeTypeFont | ImageFont) -> str:
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


ReportRow = tuple[str, str]

SHARES = ("precision", "recall", "coverage")

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}"
    "td{padding:.1em 1em .1em 0}td:last-child{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
)


def report_rows(report: EvaluationReport) -> list[ReportRow]:
    """Name and value of every measure."""
    found = [(f"reconstruction, {noise} (dB)", f"{value:.2f}") for noise, value in report.reconstruction.items()]
    for split, bits in report.likelihood.items():
        error = "" if bits.error is None else f" ± {bits.error:.4f}"
        about = f"{split}, {bits.count} pictures, {bits.draws} draws"
        found.append((f"nats/dim of the {bits.space}, {about}", f"{bits.nats_per_dim:.4f}"))
        found.append((f"bits/dim of the {bits.space}, {about}", f"{bits.bits_per_dim:.4f}{error}"))
        if bits.draw_error is not None:
            found.append((f"  of which from the draws, {split}", f"± {bits.draw_error:.5f}"))
        if bits.not_finite:
            found.append((f"pictures without a finite likelihood, {split}", f"{bits.not_finite}"))
    if report.classification:
        found.append(("accuracy of the likelihood classifier", f"{100 * report.classification.accuracy:.2f} %"))
        if report.classification.not_finite:
            found.append(("  wrong because no likelihood is finite", f"{report.classification.not_finite}"))
    if report.outliers:
        found.append(("outliers by -log p(x), AUROC", f"{report.outliers.auroc_likelihood:.4f}"))
        found.append(("outliers by typicality, AUROC", f"{report.outliers.auroc_typicality:.4f}"))
        found.append(("outliers by log p(x) less PNG's, AUROC", f"{report.outliers.auroc_ratio:.4f}"))
        found.append(("outliers by PNG's size alone, AUROC", f"{report.outliers.auroc_background:.4f}"))
        if report.outliers.not_finite:
            found.append(("  of which without a finite likelihood", f"{report.outliers.not_finite}"))
    return found + _distances(report)


def _distances(report: EvaluationReport) -> list[ReportRow]:
    found: list[ReportRow] = []
    for name, measures in report.distances.items():
        for measure, value in measures.items():
            found += _distance(name, measure, value)
    found += [(f"retrieval, {name}", f"{100 * value:.0f} %") for name, value in report.retrieval.items()]
    if report.judge:
        found += _judge(report.judge)
    if report.tuning:
        found.append(("best guidance", f"{report.guidance:g}"))
    return found


def _judge(judged: JudgeReport) -> Iterator[ReportRow]:
    for name, score in judged.scores.items():
        about = f"of {judged.names} names, {name} ({score.count})"
        for rank, share in (("first", score.top1), ("among the first 5", score.top5)):
            yield f"judge: right name {rank} {about}", f"{100 * share:.1f} ± {100 * score.error(share):.1f} %"
        if score.not_finite:
            yield f"pictures that are not finite, {name}", f"{score.not_finite}"
    error = f" ± {judged.ratio_error:.3f}"
    yield "judge: samples over reconstructions, among the first 5", f"{judged.ratio:.3f}{error}"


def _distance(name: str, measure: str, value: float) -> list[ReportRow]:
    if measure == "count":
        return []
    if measure == "not_finite":
        return [(f"pictures that are not finite, {name}", f"{value:.0f}")] if value else []
    if measure.startswith("kid"):
        return [(f"{measure} x 1000, {name}", f"{1000 * value:.1f}")]
    return [(f"{measure}, {name}", f"{100 * value:.1f} %" if measure in SHARES else f"{value:.3f}")]


def report_table(report: EvaluationReport) -> str:
    """Aligned lines."""
    found = report_rows(report)
    width = max(len(name) for name, _ in found)
    lines = [f"{name:{width}}  {value:>18}" for name, value in found]
    return "\n".join([*lines, *(f"note: {remark}" for remark in report.remarks)])


def report_page(report: EvaluationReport, title: str, sheets: Sequence[tuple[str, str]]) -> str:
    """An HTML page: the table, then each sheet (heading, file name beside the page)."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in report_rows(report)
    )
    shown = "".join(
        f'<h2>{html.escape(heading)}</h2><img src="{html.escape(file)}" alt="{html.escape(heading)}">'
        for heading, file in sheets
    )
    notes = "".join(f"<p>Note: {html.escape(remark)}.</p>" for remark in report.remarks)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{STYLE}</style><h1>{html.escape(title)}</h1><table>{cells}</table>{notes}{shown}</html>\n"
