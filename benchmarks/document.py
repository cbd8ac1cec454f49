"""Write what `starflow bench sample --output FILE`, `growth.py` and `weights.py` measured into docs/performance.md.

    python benchmarks/document.py benchmarks/results/*.json

A file's figures go between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being the file's without its suffix.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from starflow.io.files import write_text

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    for path in options.files:
        report = json.loads(path.read_text(encoding="utf-8"))
        write = growth if "sweeps" in report else weights if "formats" in report else section
        fill(options.document, path.stem, write(report))
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
        memory(report["memory"]),
    ]


def memory(found: dict[str, Any]) -> str:
    """Measured and predicted, in MiB."""
    predicted, extra = found["predicted"], found["predicted"]["packed"] if found["packed"] else 0
    peak = predicted["weights"] + predicted["cache"] + predicted["autoencoder"] + extra
    peak += max(predicted["activations"], predicted["decoding"])
    pairs = [(name, found[name], predicted[name]) for name in ("weights", "packed", "cache", "autoencoder")]
    pairs += [("at most", found["peak"], peak)]
    told = [(name, ours, foreseen) for name, ours, foreseen in pairs if ours]
    text = ", ".join(f"{name} {ours / 2**20:.0f} ({foreseen / 2**20:.0f})" for name, ours, foreseen in told)
    return f"Memory of batch {found['batch']} in MiB, predicted in brackets: {text}."


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
    return [*rows, *noise(report)]


def noise(report: dict[str, Any]) -> list[str]:
    """How far times of one and the same thing lie apart, where "auto" went token by token."""
    found = {(one["solver"], one["batch"], one["guidance"]): one for one in report["speeds"]}
    same = [
        one["seconds"] / found["sequential", *key]["seconds"] - 1
        for (solver, *key), one in found.items()
        if solver == "auto" and one["deviation"] == 0
    ]
    if not same:
        return []
    return [
        "",
        f'Where "auto" is off by 0 it went token by token as well: that its times there are {min(same):+.0%} to '
        f"{max(same):+.0%} from those of sequential is this machine's noise.",
    ]


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


def weights(report: dict[str, Any]) -> str:
    """What every format costs: a paragraph and a table."""
    lines = [
        f"`{report['model']}`: {report['pictures']} held-out pictures take {report['nats_per_dim']:.3f} nats/dim "
        f"with float32 weights ({report['weight_bytes'] / 2**20:.1f} MiB). {report['samples']} samples of equal seeds, "
        f"guidance {report['guidance']:g}.",
        "",
        "| weights | MiB | nats/dim lost | of one picture at most | latents apart, mean | at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in report["formats"].items():
        lines.append(
            f"| {name} | {one['weight_bytes'] / 2**20:.1f} | {one['nats_per_dim_change']:+.5f} ± "
            f"{one['standard_error']:.5f} | {one['nats_per_dim_change_largest']:.5f} | "
            f"{one['latents_apart_mean']:.1%} | {one['latents_apart_largest']:.1%} |"
        )
    return "\n".join([*lines, "", f"Command: `{report['command']}`."])


NEEDS = ("weights", "cache", "arithmetic")


def growth(report: dict[str, Any]) -> str:
    """A paragraph and a table a sweep."""
    loads = " to ".join(f"{load[0]:.2f}" for load in report["load"])
    lines = [
        f"{report['block'].capitalize()}; {report['machine']}, torch {report['torch']}, {report['date']}, "
        f"load {loads}. Ceilings of the run: {report['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{report['flops_per_second'] / 1e9:.0f} "
        "GFLOP/s. The slope is that of the time since the row above (1 is linear); weights, cache and arithmetic are "
        "what these alone take at the ceilings; the last column is how many passes over all tokens cost as much.",
    ]
    for name, rows in report["sweeps"].items():
        heads = (name, "s a batch", "slope", *NEEDS, "share", "a pass", "passes")
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [growth_row(name, row) for row in rows]
    lines += ["", "![cost against tokens, batch and width](images/growth.png)"]
    return "\n".join([*lines, "", f"Command: `{report['command']}`."])


def growth_row(name: str, row: dict[str, Any]) -> str:
    needs, slope = row["needs"], f"{row['exponent']:.2f}" if "exponent" in row else ""
    cells = [f"**{needs[need]:.3f}**" if need == row["most"] else f"{needs[need]:.3f}" for need in NEEDS]
    limit = max(needs["weights"] + needs["cache"], needs["arithmetic"])
    return (
        f"| {row[name]} | {row['sequential_seconds']:.3f} | {slope} | {' | '.join(cells)} "
        f"| {limit / row['sequential_seconds']:.0%} | {row['pass_seconds']:.3f} "
        f"| {row['passes_that_cost_as_much']:.1f} |"
    )


if __name__ == "__main__":
    main()
