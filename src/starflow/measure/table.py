"""A report as a table, as lines of text or as a page with its pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from starflow.measure.plan import Report

Row = tuple[str, str]
PERCENT = ("precision", "recall", "coverage")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}"
    "td{padding:.1em 1em .1em 0}td:last-child{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
)


def rows(report: Report) -> list[Row]:
    """Name and value of every measure."""
    found = [(f"reconstruction, {noise} (dB)", f"{value:.2f}") for noise, value in report.reconstruction.items()]
    for split, bits in report.likelihood.items():
        error = f" ± {bits.error:.4f}"
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
        if report.outliers.not_finite:
            found.append(("  of which without a finite likelihood", f"{report.outliers.not_finite}"))
    return found + _distances(report)


def _distances(report: Report) -> list[Row]:
    found: list[Row] = []
    for name, measures in report.distances.items():
        for measure, value in measures.items():
            found += _distance(name, measure, value)
    found += [(f"retrieval, {name}", f"{100 * value:.0f} %") for name, value in report.retrieval.items()]
    if report.tuning:
        found.append(("best guidance", f"{report.guidance:g}"))
    return found


def _distance(name: str, measure: str, value: float) -> list[Row]:
    if measure == "count":
        return []
    if measure == "not_finite":
        return [(f"pictures that are not finite, {name}", f"{value:.0f}")] if value else []
    if measure.startswith("kid"):
        return [(f"{measure} x 1000, {name}", f"{1000 * value:.1f}")]
    return [(f"{measure}, {name}", f"{100 * value:.1f} %" if measure in PERCENT else f"{value:.3f}")]


def table(report: Report) -> str:
    """Aligned lines."""
    found = rows(report)
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:{width}}  {value:>18}" for name, value in found)


def page(report: Report, title: str, sheets: Sequence[tuple[str, str]]) -> str:
    """An HTML page: the table, then each sheet (heading, file name beside the page)."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows(report)
    )
    shown = "".join(
        f'<h2>{html.escape(heading)}</h2><img src="{html.escape(file)}" alt="{html.escape(heading)}">'
        for heading, file in sheets
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{STYLE}</style><h1>{html.escape(title)}</h1><table>{cells}</table>{shown}</html>\n"
