"""`python -m experiments NAME` computes what is missing of an experiment, draws its plot, and prints its tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.results import Result, markdown_table, update_document, write_result

NAMES = (
    "universality",
    "transformers",
    "scaling",
    "deep-shallow",
    "guidance",
    "fashion-mnist",
    "decoder",
    "inpainting",
    "cleaning",
    "student",
    "sbi",
    "latents",
    "condition",
    "depth",
    "noise",
)
FOLDERS = {
    "transformers": "universality",
    **dict.fromkeys(("latents", "condition", "depth", "noise"), "design-choices"),
}
"""Where experiments share their cells, the folder in results/."""
GLYPHS = Path("data/glyphs")


def main() -> int:
    """Run one experiment and return the exit code."""
    from starflow.errors import UserError

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument(
        "--output",
        type=Path,
        help="the experiment's folder (default: results/NAME, or the one that it shares)",
    )
    parser.add_argument("--document", type=Path, help="a Markdown file whose section of that name is written anew")
    parser.add_argument("--quick", action="store_true", help="a minute's run, to try the code alone")
    parser.add_argument("--steps", type=int, default=0, help="updates of every variant (default: the experiment's own)")
    parser.add_argument("--patch-size", type=int, default=2, help="for fashion-mnist: side of a patch, 2 or 4")
    parser.add_argument(
        "--longer", type=int, default=0, help="for decoder: updates of one more run of L2 (default: none)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=0,
        help="for inpainting: how many are filled (default: 48); for fashion-mnist: of every likelihood (1,000)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="Fashion-MNIST's four files (default: Debian's), or the glyphs",
    )
    parser.add_argument(
        "--autoencoder", default="madebyollin/taesd", help="for decoder and cleaning: a folder or hub id"
    )
    parser.add_argument("--model", default="glyphs", help="for student: a model's folder that holds one")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from starflow.train.loop import Interrupted

    folder: Path = options.output or Path("results") / FOLDERS.get(options.name, options.name)
    try:
        result = _run(options, folder)
    except UserError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    write_result(folder, result)
    if options.document and not options.quick:
        update_document(options.document, result, folder / f"{result.name}.png")
    print("\n\n".join(markdown_table(table) for table in result.tables))
    return 0


def _run(options: argparse.Namespace, folder: Path) -> Result:
    import dataclasses

    import torch

    from experiments import (
        cleaning,
        decoder,
        deep_shallow,
        design_choices,
        fashion_mnist,
        guidance,
        inpainting,
        sbi,
        scaling,
        student,
        universality,
    )
    from starflow.nn.cpu import keep_freed_memory

    command = " ".join(["python -m experiments", *without_own_paths(sys.argv[1:])])
    changed = {"steps": options.steps} if options.steps else {}
    device = torch.device(options.device)
    keep_freed_memory()
    if options.name in universality.EXPERIMENTS:
        budget = dataclasses.replace(universality.QUICK if options.quick else universality.Budget(), **changed)
        return universality.run(folder, budget, _log, command, options.name)
    if options.name == "scaling":
        curves = dataclasses.replace(scaling.QUICK if options.quick else scaling.Budget(), **changed)
        return scaling.run(folder, curves, _log, command)
    if options.name == "deep-shallow":
        deep = dataclasses.replace(deep_shallow.QUICK if options.quick else deep_shallow.Budget(), **changed)
        return deep_shallow.run(folder, deep, _log, command, options.data, device)
    if options.name == "fashion-mnist":
        fashion = fashion_mnist.QUICK if options.quick else fashion_mnist.Budget()
        changed |= {"pictures": options.pictures} if options.pictures else {}
        fashion = dataclasses.replace(fashion, patch_size=options.patch_size, **changed)
        return fashion_mnist.run(folder, fashion, _log, command, options.data, device)
    if options.name == "decoder":
        changed |= {"longer": options.longer} if options.longer else {}
        noisy = dataclasses.replace(decoder.QUICK if options.quick else decoder.Budget(), **changed)
        return decoder.run(folder, noisy, _log, command, options.autoencoder, options.data or GLYPHS, device)
    if options.name == "cleaning":
        ways = cleaning.QUICK if options.quick else cleaning.Budget()
        ways = dataclasses.replace(ways, **({"flow": options.steps} if options.steps else {}))
        return cleaning.run(folder, ways, _log, command, options.autoencoder, options.data or GLYPHS, device)
    if options.name == "student":
        judged = student.QUICK if options.quick else student.Budget()
        return student.run(folder, judged, _log, command, options.model, options.data or GLYPHS)
    if options.name == "inpainting":
        filling = inpainting.QUICK if options.quick else inpainting.Budget()
        filling = dataclasses.replace(filling, **({"pictures": options.pictures} if options.pictures else {}))
        return inpainting.run(folder, filling, _log, command, options.data or GLYPHS, device)
    if options.name == "sbi":
        return sbi.run(folder, sbi.QUICK if options.quick else sbi.Budget(), _log, command)
    if options.name in design_choices.EXPERIMENTS:
        choice = dataclasses.replace(design_choices.QUICK if options.quick else design_choices.Budget(), **changed)
        return design_choices.run(folder, choice, _log, command, options.name, device)
    guided = dataclasses.replace(guidance.QUICK if options.quick else guidance.Budget(), **changed)
    return guidance.run(folder, guided, _log, command, options.data, device)


def without_own_paths(words: Sequence[str]) -> list[str]:
    """The command's words as a document may show them: absolute paths, which are one machine's own, as FOLDER."""
    return ["FOLDER" if Path(word).is_absolute() else word for word in words]


def _log(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
