"""Measure a model that was trained on the set glyphs2 against the bars of the bundled one.

    python benchmarks/glyphs2.py RUN/model --judge judge.safetensors --output out/glyphs2

Writes the sheets of recipes/prompts.txt and recipes/prompts-objects.txt, shuffled and without captions, with their keys
in text files. Then it measures likelihoods, what the judge names, and distances. Each figure is printed once it is
there; all are in figures.json, and in README.md, a model card with blanks (____) where a person is needed.

`--tune` instead compares settings by the judge, on prompts of training pictures that neither file asks for. Where the
judge's file is missing it is made first, which takes about seven minutes of one core (`--parts judge --judged 2` does
little else).

Weights that began from the bundled "glyphs" have seen some of the held-out pictures: what has a training picture in
data/glyphs, and what is held out with it, is left out of every held-out figure. The reverse holds as well: the
references of the old protocol, the held-out pictures of data/glyphs, are mostly training pictures of glyphs2.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from starflow.cli.generate import read_prompt_file
from starflow.data.images import save_png
from starflow.data.sources.base import ImageRecord
from starflow.data.sources.folder import read_folder
from starflow.data.views import TrainingViews
from starflow.evaluate import (
    EvaluationSet,
    FeatureExtractor,
    extract_features,
    kernel_distance,
    load_extractor,
    load_judge,
    measure_judge,
    precision_recall,
)
from starflow.evaluate.dataset import concept_of, evenly_spaced, image_batches
from starflow.evaluate.judge import (
    LEAST_PICTURES,
    PICTURES_A_CONCEPT,
    Judge,
    JudgeReport,
    judge_features,
    open_judge,
    some_of_each,
)
from starflow.evaluate.likelihood import measure_likelihoods
from starflow.evaluate.render import contact_sheet
from starflow.evaluate.samples import draw_samples, reconstruct
from starflow.io.files import write_json, write_text
from starflow.pipeline.pipeline import StarFlowPipeline

ROOT = Path(__file__).parent.parent
SHEETS = {"prompts": ROOT / "recipes/prompts.txt", "objects": ROOT / "recipes/prompts-objects.txt"}
CARD = Path(__file__).with_name("glyphs2-card.md")
KEY = 20
"""Seed of the order of the pictures on a sheet."""
COLUMNS = 8
SIZE = 64
LIKELIHOODS = 400
"""Pictures a split."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path("data/glyphs2"))
    parser.add_argument("--base", type=Path, default=Path("data/glyphs"), help="the set that the weights began from")
    parser.add_argument("--judge", type=Path, default=Path("judge.safetensors"))
    parser.add_argument("--output", type=Path, default=Path("out/glyphs2"))
    parser.add_argument("--guidance", type=float, nargs="*", help="default: the model's")
    parser.add_argument("--temperature", type=float, nargs="*", help="default: the model's")
    parser.add_argument("--candidates", type=int, nargs="*", help="default: the model's")
    parser.add_argument("--judged", type=int, default=200, help="samples that the judge is shown")
    parser.add_argument("--samples", type=int, default=400, help="samples for each distance")
    parser.add_argument("--tune", action="store_true", help="the judge alone, on training prompts, for all settings")
    parser.add_argument("--parts", nargs="*", default=["sheets", "likelihood", "judge", "new", "old"])
    options = parser.parse_args()
    torch.manual_seed(0)
    pipeline = StarFlowPipeline.from_pretrained(options.model)
    config = pipeline.config
    grid = product(
        options.guidance or [config.guidance],
        options.temperature or [config.temperature],
        options.candidates or [config.candidates],
    )
    settings = [dict(zip(("guidance", "temperature", "candidates"), one, strict=True)) for one in grid]
    if options.tune:
        tune(pipeline, options, settings)
        return
    pipeline.config = dataclasses.replace(config, **settings[0])
    measure(pipeline, options)


def measure(pipeline: StarFlowPipeline, options: argparse.Namespace) -> None:
    """Everything but the tuning, part by part."""
    config, began = pipeline.config, time.perf_counter()
    figures: dict[str, Any] = {
        "model": options.model,
        "guidance": config.guidance,
        "temperature": config.temperature,
        "candidates": config.candidates,
    }

    def keep(part: str, found: dict[str, Any]) -> None:
        figures[part] = found | {"seconds": round(time.perf_counter() - began)}
        print(part, figures[part], flush=True)
        write_json(options.output / "figures.json", figures)
        write_text(options.output / "README.md", fill_card(CARD.read_text(encoding="utf-8"), figures))

    options.output.mkdir(parents=True, exist_ok=True)
    if "sheets" in options.parts:
        for name, file in SHEETS.items():
            save_sheet(pipeline, read_prompt_file(file), options.output, name)
        keep("sheets", {"key": KEY})
    records = list(read_folder(options.data, print))
    pairs, left_out = clean_pairs(records, options.base)
    train = [record for record in records if record.split == "train"]
    dataset = EvaluationSet.of_records([*alike(train, pairs, LIKELIHOODS), *pairs], SIZE)
    keep("held-out pairs", {"clean": len(pairs), "left out, seen by the first weights": left_out})
    if "likelihood" in options.parts:
        bits = measure_likelihoods(pipeline, dataset, LIKELIHOODS, 1)
        nats = {split: found.nats_per_dim for split, found in bits.items()}
        counts = {f"{split} pictures": found.count for split, found in bits.items()}
        keep("likelihood", nats | counts | {"gap": nats["heldout"] - nats["train"]})
    if "judge" in options.parts:
        features = judge_features()
        judge = make_judge(options.judge, train, pairs[:1], features)
        keep("judge", judged(measure_judge(pipeline, dataset, judge, features, options.judged)))
    extractor = load_extractor()
    if "new" in options.parts:
        keep("distances, held-out pairs of glyphs2", distances(pipeline, extractor, dataset.heldout, options.samples))
    if "old" in options.parts:
        base = read_folder(options.base, print)
        trained = {record.name for record in train}
        heldout = [record for record in base if record.split == "heldout"]
        first = next(record for record in base if record.split == "train")
        views = EvaluationSet.of_records([first, *heldout], SIZE).heldout
        shared = sum(record.name in trained for record in heldout)
        found = distances(pipeline, extractor, views, options.samples)
        keep("distances, held-out pictures of glyphs", found | {"of these, training pictures of glyphs2": shared})


def fill_card(text: str, figures: dict[str, Any]) -> str:
    """The card with every `{part/measure}` in it; what was not measured becomes a blank.

    >>> fill_card("{judge/ratio}, {guidance}, {old/kid}", {"judge": {"ratio": 0.7512}, "guidance": 3.0})
    '0.751, 3.0, ____'
    """

    def value(found: re.Match[str]) -> str:
        at: Any = figures
        for key in found[1].split("/"):
            at = at.get(key, "____") if isinstance(at, dict) else "____"
        if isinstance(at, dict):  # a set that was judged
            top1, top5 = ("{:.1f} ± {:.1f} %".format(*(100 * share for share in at[name])) for name in ("top1", "top5"))
            return f"{top1}; {top5} ({at['count']})"
        return f"{at:.3f}" if isinstance(at, float) and at != round(at, 2) else str(at)

    return re.sub(r"\{([^{}]+)\}", value, text)


def make_judge(
    file: Path, train: Sequence[ImageRecord], heldout: Sequence[ImageRecord], features: FeatureExtractor
) -> Judge:
    """The judge in the file, or one of the training pictures, of which only those that it takes are read."""
    if file.exists():
        return load_judge(file)
    rows = some_of_each([record.meta["concept"] for record in train], LEAST_PICTURES, PICTURES_A_CONCEPT)
    return open_judge(file, EvaluationSet.of_records([*(train[row] for row in rows), *heldout], SIZE), features, print)


def clean_pairs(records: Sequence[ImageRecord], base: Path) -> tuple[list[ImageRecord], int]:
    """Held-out pictures of known concepts, without what `base` trains on, and how many that leaves out."""
    known = {record.meta["concept"] for record in records if record.split == "train"}
    seen = {record.name for record in read_folder(base, print) if record.split == "train"}
    units = {_unit(record) for record in records if record.name in seen}
    pairs = [record for record in records if record.split == "heldout" and record.meta["concept"] in known]
    clean = [record for record in pairs if _unit(record) not in units]
    return clean, len(pairs) - len(clean)


def alike(train: Sequence[ImageRecord], heldout: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """About `count` training pictures, of each sampling group the share that it has among the held-out ones.

    Emoji are likelier than icons, so that a gap between other mixtures would be one of groups.
    """
    shares = Counter(record.meta["sampling_group"] for record in heldout)
    found = []
    for group, number in shares.items():
        of_group = [record for record in train if record.meta["sampling_group"] == group]
        found += [of_group[row] for row in evenly_spaced(len(of_group), max(1, count * number // len(heldout)))]
    return found


def _unit(record: ImageRecord) -> tuple[str, str]:
    return record.meta["concept"], record.meta["family"]


def save_sheet(pipeline: StarFlowPipeline, prompts: list[str], folder: Path, name: str) -> None:
    """The pictures of the prompts in an order by `KEY`, their prompts in a text file, and a sheet in prompts' order."""
    images = pipeline(prompts, seed=0, not_finite="keep").images
    order = list(range(len(prompts)))
    random.Random(KEY).shuffle(order)
    places = [f"{number + 1}" for number in range(len(order))]
    save_png(contact_sheet([images[row] for row in order], places, COLUMNS), folder / f"{name}-blind.png")
    write_text(
        folder / f"{name}-key.txt",
        "".join(f"{place}\t{prompts[row]}\n" for place, row in zip(places, order, strict=True)),
    )
    save_png(contact_sheet(images, prompts, COLUMNS), folder / f"{name}.png")


def judged(report: JudgeReport) -> dict[str, Any]:
    """The report in numbers for a file: shares with their standard errors."""
    found: dict[str, Any] = {"names": report.names, "ratio": report.ratio, "ratio_error": report.ratio_error}
    for name, score in report.scores.items():
        top1, top5 = ((round(share, 4), round(score.error(share), 4)) for share in (score.top1, score.top5))
        found[name] = {"top1": top1, "top5": top5, "count": score.count, "not_finite": score.not_finite}
    return found | {"unknown": report.unknown, "trained": report.trained}


def distances(
    pipeline: StarFlowPipeline, extractor: FeatureExtractor, views: TrainingViews, count: int
) -> dict[str, float]:
    """Kernel distance and recall of samples of these pictures' prompts, and the distance of their reconstructions."""
    cpu = torch.device("cpu")
    references = extract_features(extractor, image_batches(views.images, cpu)).features
    drawn = draw_samples(pipeline, views, count, pipeline.config.guidance, 0)
    samples = extract_features(extractor, drawn).finite_rows().features
    rows = range(min(count, len(views)))
    made = (
        reconstruct(pipeline, views.images, rows[at : at + 64], pipeline.config.noise_std)
        for at in range(0, len(rows), 64)
    )
    balls = precision_recall(samples, references)
    return {
        "kid_mobilenetv2 x 1000": 1000 * kernel_distance(samples, references).value,
        "kid_mobilenetv2 x 1000, reconstructions": 1000
        * kernel_distance(extract_features(extractor, made).features, references).value,
        "recall": balls.recall,
        "precision": balls.precision,
        "samples": len(samples),
        "references": len(references),
    }


def tune(pipeline: StarFlowPipeline, options: argparse.Namespace, settings: list[dict[str, Any]]) -> None:
    """The judge's share of samples of training prompts of emoji for every setting; reconstructions beside them."""
    asked = {prompt for file in SHEETS.values() for prompt in read_prompt_file(file)}
    records = [record for record in read_folder(options.data, print) if record.split == "train"]
    named = {concept_of(prompt, {record.caption.lower() for record in records}) for prompt in asked}
    spared = {record.meta["concept"] for record in records if record.caption.lower() in named}
    others = [r for r in records if r.meta["sampling_group"] == "emoji" and r.meta["concept"] not in spared]
    chosen = [others[row] for row in evenly_spaced(len(others), options.judged)]
    features = judge_features()
    judge = make_judge(options.judge, records, [dataclasses.replace(chosen[0], split="heldout")], features)
    # Nothing is held back from a judge here: it is asked about samples, of which it has seen none.
    judge = dataclasses.replace(judge, trained=frozenset())
    views = EvaluationSet.of_records([chosen[0], *(dataclasses.replace(r, split="heldout") for r in chosen)], SIZE)
    print(f"{len(chosen)} prompts of training pictures; left out are {len(spared)} concepts of the two files")
    for one in settings:
        pipeline.config = dataclasses.replace(pipeline.config, **one)
        began = time.process_time()
        *_, rebuilt, score = measure_judge(pipeline, views, judge, features, options.judged).scores.values()
        shares = f"top 1 {score.top1:.3f}, top 5 {score.top5:.3f} +- {score.error(score.top5):.3f} of {score.count}"
        spent = time.process_time() - began
        print(one, f"{shares}; reconstructions {rebuilt.top1:.3f}, {rebuilt.top5:.3f}; {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
