"""`starflow evaluate` measures a model on a set of images: a table, JSON, and a page with contact sheets."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from starflow.cli.options import Argument, Device, Flag, pick_device
from starflow.errors import UserError
from starflow.io.files import check_output_folder, json_text, write_text

if TYPE_CHECKING:
    from starflow.evaluate.report import ContactSheets, EvaluationReport, EvaluationSettings

COLUMNS = 8
"""Of a contact sheet."""

OF_SAMPLES: tuple[str, ...] = (
    *("sampler", "judge", "samples", "tuning_samples", "references", "guidance", "temperature", "candidates"),
    *("prompts", "features", "feature_weights", "reference", "save_reference", "cleaning"),
)
"""Options that --bpd leaves nothing to do for."""

TIMEOUT = 1800.0
"""Seconds that a process waits for the others, whose share of the work may take longer."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model on pictures: likelihood of both splits, reconstruction, distances of samples, retrieval.

    DATA is the glyph set, any folder of pictures (held out is what the model was not trained on), 'fashion-mnist', or a
    folder with its four files. Writes report.json, report.html and its sheets: samples, the nearest training picture of
    each, reconstructions. Under torchrun the work is shared, with the same result.

    Distances are named after their features: --features inception gives fid, kid and is, by torch-fidelity or by
    inception=MODULE:CLASS with --feature-weights; the others end in the network's name.
    """

    EXAMPLES: ClassVar[str] = """
        starflow evaluate glyphs data/glyphs --prompts recipes/prompts.txt
        starflow evaluate runs/glyphs2-64/model data/glyphs2 --judge judge.safetensors --trained-on data/glyphs
        starflow evaluate runs/mine/model photos --samples 500 --output report
        starflow evaluate runs/fashion-mnist/model fashion-mnist --bpd --draws 4 --classify --outliers digits
        starflow evaluate runs/glyphs-64-student/pipeline data/glyphs --sampler student
        starflow evaluate runs/mine/model photos --features inception --reference VIRTUAL_imagenet256.npz
    """

    model: Annotated[str, Argument("bundled name, folder, or hub repository", "MODEL")]
    data: Annotated[str, Argument("a folder of pictures, or fashion-mnist", "DATA")]
    output: Annotated[str, Flag("the report's folder", "PATH")] = "evaluation"
    bpd: Annotated[bool, Flag("likelihoods alone: no reconstructions, samples or distances")] = False
    draws: Annotated[int, Flag("draws of the noise that a likelihood is averaged over", "N")] = 1
    pictures: Annotated[int, Flag("pictures a split, at most, for likelihoods; 0 is all held out", "N")] = 0
    classify: Annotated[bool, Flag("measure argmax_c log p(x | c) as a classifier of the labels")] = False
    outliers: Annotated[str, Flag("tell this set apart by likelihood: a folder, or digits (MNIST)", "DATA")] = ""
    samples: Annotated[int, Flag("samples for the distances", "N")] = 1000
    tuning_samples: Annotated[int, Flag("samples per guidance weight when the best is chosen", "N")] = 250
    references: Annotated[int, Flag("pictures a split, at most, that distances are measured to", "N")] = 5000
    guidance: Annotated[tuple[float, ...], Flag("a weight to try; may be repeated (default: 0 to 4)", "W")] = ()
    temperature: Annotated[float | None, Flag("factor on the samples' noise (default: the model's)", "T")] = None
    candidates: Annotated[int | None, Flag("drawn for each sample that is kept (default: the model's)", "K")] = None
    prompts: Annotated[str, Flag("prompts of the sheet, one a line (default: some held-out ones)", "FILE")] = ""
    features: Annotated[str, Flag("mobilenetv2, inception, or NAME=MODULE:CLASS", "NETWORK")] = "mobilenetv2"
    feature_weights: Annotated[str, Flag("weights of a network of your own", "FILE")] = ""
    reference: Annotated[str, Flag("moments to measure a Frechet distance to, e.g. ADM's .npz", "FILE")] = ""
    save_reference: Annotated[
        str, Flag("write the moments of the held-out pictures, as a --reference (.safetensors)", "FILE")
    ] = ""
    sampler: Annotated[
        Literal["flow", "student"], Flag("what draws: the flow, or the model's student, an approximation")
    ] = "flow"
    cleaning: Annotated[
        Literal["model", "decoder", "tweedie", "denoiser", "none"], Flag("the samples' way out of the noise")
    ] = "model"
    judge: Annotated[
        str, Flag("also let a judge name the samples: its file, made from DATA in minutes if missing", "FILE")
    ] = ""
    heldout: Annotated[
        Literal["all", "known", "new"], Flag("which held-out pictures: of concepts known in training, of new ones")
    ] = "all"
    trained_on: Annotated[
        str, Flag("a set that the weights have seen before: its training pictures are not held out here", "FOLDER")
    ] = ""
    device: Annotated[Device, Flag("where to compute")] = "auto"
    json: Annotated[bool, Flag("print the report as JSON")] = False

    def __post_init__(self) -> None:
        least = (
            ("--samples", self.samples, 2),
            ("--tuning-samples", self.tuning_samples, 2),
            ("--draws", self.draws, 1),
        )
        for name, value, lowest in (*least, ("--references", self.references, 2), ("--pictures", self.pictures, 0)):
            if value < lowest:
                raise UserError(f"{name} is {value}, expected at least {lowest}")
        given = [name for name in OF_SAMPLES if getattr(self, name) != getattr(EvaluateOptions, name)]
        if self.bpd and given:
            name = given[0].replace("_", "-")
            raise UserError(f"--{name} is about samples and --bpd measures likelihoods alone: choose one")
        if self.sampler == "student" and self.cleaning not in ("model", "none"):
            raise UserError("--cleaning has no effect with --sampler student, which draws clean latents: leave it out")
        if self.judge and not self.judge.endswith(".safetensors"):
            raise UserError(f"--judge is '{self.judge}', expected a name ending in .safetensors")
        if self.save_reference and not self.save_reference.endswith(".safetensors"):
            raise UserError(f"--save-reference is '{self.save_reference}', expected a name ending in .safetensors")


def evaluate(options: EvaluateOptions) -> None:
    """Run `starflow evaluate`."""
    folder = check_output_folder(Path(options.output).expanduser())
    from starflow.evaluate import load_extractor
    from starflow.evaluate.dataset import is_first, open_evaluation_set, training_names
    from starflow.evaluate.report import evaluate_pipeline
    from starflow.pipeline.config import default_size
    from starflow.pipeline.locate import find_pipeline
    from starflow.pipeline.pipeline import StarFlowPipeline
    from starflow.train.distributed import join_world

    with join_world(pick_device(options.device), TIMEOUT) as world:
        settings = _settings(options)
        weights = Path(options.feature_weights).expanduser() if options.feature_weights else None
        extractor = None if options.bpd else load_extractor(options.features, weights)
        world.run_on_hosts(lambda: find_pipeline(options.model))  # one process fetches and converts
        pipeline = StarFlowPipeline.from_pretrained(options.model, world.device)
        if options.cleaning != "model":
            pipeline.config = dataclasses.replace(pipeline.config, cleaning=options.cleaning)
        size = default_size(pipeline.config, pipeline.flow.config)
        dataset = open_evaluation_set(options.data, size, pipeline.config.heldout)
        if options.heldout != "all" or options.trained_on:
            dataset = dataset.narrowed(options.heldout, training_names(options.trained_on))

        def log(text: str) -> None:
            if is_first():
                print(f"{text} ...", file=sys.stderr, flush=True)

        report = evaluate_pipeline(pipeline, dataset, settings, log, extractor, options.outliers)
        if is_first():
            write_report(folder, report, options)


def write_report(folder: Path, report: EvaluationReport, options: EvaluateOptions) -> None:
    """Write the files of the report, and print its table or its JSON."""
    from starflow.evaluate.render import report_page, report_table

    given = {"model": options.model, "data": options.data, "sampler": options.sampler, "cleaning": options.cleaning}
    values = given | report.as_json()
    write_text(folder / "report.json", json_text(values) + "\n")
    sheets = _save_sheets(folder, report.sheets) if report.sheets.samples else []
    write_text(folder / "report.html", report_page(report, f"{options.model} on {options.data}", sheets))
    print(json_text(report.as_json()) if options.json else report_table(report))


def _save_sheets(folder: Path, sheets: ContactSheets) -> list[tuple[str, str]]:
    from starflow.evaluate import save_contact_sheet

    save_contact_sheet(folder / "samples.png", sheets.samples, sheets.prompts, COLUMNS)
    save_contact_sheet(folder / "nearest.png", sheets.nearest, sheets.prompts, COLUMNS)
    both = [picture for pair in zip(sheets.originals, sheets.reconstructions, strict=True) for picture in pair]
    captions = [caption for _ in sheets.originals for caption in ("held out", "reconstructed")]
    save_contact_sheet(folder / "reconstructions.png", both, captions, COLUMNS)
    return [
        ("Samples", "samples.png"),
        ("The nearest training picture of each", "nearest.png"),
        ("Reconstructions, with the flow's noise on the latents", "reconstructions.png"),
    ]


def _settings(options: EvaluateOptions) -> EvaluationSettings:
    from starflow.cli.generate import read_prompt_file
    from starflow.evaluate.report import EvaluationSettings
    from starflow.evaluate.samples import SamplingOptions

    weights = {"guidance": options.guidance} if options.guidance else {}
    return EvaluationSettings(
        samples=options.samples,
        tuning_samples=options.tuning_samples,
        prompts=tuple(read_prompt_file(Path(options.prompts))) if options.prompts else (),
        references=options.references,
        pictures=options.pictures,
        draws=options.draws,
        only_likelihood=options.bpd,
        classify=options.classify,
        reference_moments=options.reference,
        keep_moments=options.save_reference,
        judge=options.judge,
        sampling=SamplingOptions(options.sampler, options.temperature, options.candidates),
        **weights,
    )
