"""Write what `starflow bench sample --output FILE` measured into docs/performance.md.

    python benchmarks/document.py benchmarks/results/sample.json benchmarks/results/sample-trained.json

A file's figures go between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being the file's without its suffix.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from starflow.files import write_text

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    for path in options.files:
        fill(options.document, path.stem, section(json.loads(path.read_text(encoding="utf-8"))))
        print(f"{path} -> {options.document}")


def fill(document: Path, name: str, text: str) -> None:
    """Put text in the place of that name; a document without one is an error."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = document.read_text(encoding="utf-8")
    after, count = re.subn(
        f"{re.escape(first)}.*?{re.escape(last)}", lambda _: f"{first}\n{text}\n{last}", before, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{document} has {count} places '{first} .. {last}', expected 1")
    write_text(document, after)


def section(report: dict[str, Any]) -> str:
    """A paragraph, the table of our own speeds, and that of the others."""
    return "\n".join([*facts(report), "", *speeds(report), *others(report), "", f"Command: `{report['command']}`."])


def facts(report: dict[str, Any]) -> list[str]:
    ceilings, once = report["ceilings"], report["once"]
    loads = " to ".join(f"{load[0]:.2f}" for load in report["load"])
    weights = "trained" if report["trained"] else "random weights, token by token only"
    built = f"{'compiled' if once['compiled'] else 'loaded'} in {once['build_seconds']:.2f} s"
    loop = f"{built}, weights packed in {once['pack_seconds']:.2f} s" if once["packed_bytes"] else "no compiled loop"
    return [
        f"{report['parameters'] / 1e6:.1f} M parameters ({weights}), {report['tokens']} tokens, {report['dtype']}; "
        f"{report['machine']}, torch {report['torch']}, {report['date']}, load {loads}.",
        f"Ceilings of the run: {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{ceilings['flops_per_second'] / 1e9:.0f} GFLOP/s. First picture after {once['first_picture_seconds']:.2f} s "
        f"({loop}).",
    ]


def speeds(report: dict[str, Any]) -> list[str]:
    rows = [
        "| solver | batch | guidance | s a picture | pictures/s | tokens/s | GB/s | GFLOP/s | limit | share | off by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report["speeds"]:
        rows.append(
            f"| {one['solver']} | {one['batch']} | {one['guidance']:g} | {one['seconds_per_picture']:.3f} "
            f"| {one['pictures_per_second']:.2f} | {one['tokens_per_second']:.0f} "
            f"| {one['bytes_per_second'] / 1e9:.1f} | {one['flops_per_second'] / 1e9:.0f} "
            f"| {one['limit_seconds']:.3f} | {one['share_of_limit']:.0%} | {one['deviation']:.0e} |"
        )
    return rows


def others(report: dict[str, Any]) -> list[str]:
    if not report["others"]:
        return []
    solvers = list(report["others"][0]["speedup"])
    rows = [
        "",
        f"Batch {report['compare_at']}, guidance {report['guidance']:g}, in turn with ours:",
        "",
        f"| other way | s a batch | limits | {' | '.join(f'{solver} is faster by' for solver in solvers)} |",
        "|---|---|---|" + "---|" * len(solvers),
    ]
    for one in report["others"]:
        factors = " | ".join(f"{one['speedup'][solver]:.2f}x" for solver in solvers)
        rows.append(f"| {one['name']}: {one['note']} | {one['seconds']:.2f} | {one['limits']:.1f} | {factors} |")
    return rows


if __name__ == "__main__":
    main()
