"""A decoder's training run: images, their latents, the training, the report, and the pipeline that uses the decoder.

RUN/decoder.json   the settings         RUN/views.safetensors, RUN/latents.safetensors   images and their latents
RUN/log.jsonl, samples/, checkpoints/, best/, model/   as any training; RUN/report.json: before and after
RUN/pipeline/      the pipeline it was started from, where it was one, with the new decoder
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from starflow.config import to_dict
from starflow.data.images import to_float
from starflow.data.sources.base import ImageRecord
from starflow.data.sources.folder import read_folder
from starflow.data.views import TrainingViews, ViewConfig, load_views, make_views, save_views
from starflow.errors import UserError
from starflow.evaluate import extract_features, kernel_distance, load_extractor, psnr
from starflow.evaluate.dataset import evenly_spaced
from starflow.evaluate.features import has_mobilenet
from starflow.io import files
from starflow.latents import Autoencoder, DecoderModule, TrainableAutoencoder, load_trainable, memory_layout
from starflow.pipeline.folder import BUNDLED
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.loop import fit
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.decoder import (
    EVALUATION_BATCH,
    DecoderLoss,
    DecoderObjective,
    DecoderTask,
    EncodedImages,
    PerceptualName,
    encode_latents,
    load_perceptual,
)

DEFAULT_NOISE = 0.3
"""Standard deviation of the latent noise where neither the settings nor a pipeline say it."""


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of a decoder's training run; see `starflow train-decoder --help`."""

    model: str
    """An autoencoder or a pipeline: a folder or a hub id."""
    data: str
    """A folder of images."""
    train: TrainSettings
    noise_std: float | None = None
    """Standard deviation of the latent noise; None is the pipeline's, or 0.3."""
    size: int = 128
    """Side that images are read at, in pixels."""
    crop: int = 64
    """Side of a training crop, in pixels; 0 is the whole image."""
    views: int = 1
    """Augmented views of a training image."""
    pictures: int = 0
    """Training images, at most, spread over the set; 0 is all."""
    report: int = 0
    """Held-out images of the report, at most; 0 is all."""
    heldout: int = 64
    """Held-out images of the evaluations on the way, at most; 0 is all."""
    features: PerceptualName = "mobilenetv2"
    loss: DecoderLoss = field(default_factory=DecoderLoss)


@dataclass(frozen=True)
class DecoderReport:
    """The value of each measure on the held-out images, with the old decoder and with the new one."""

    measures: dict[str, tuple[float, float]]
    count: int
    noise_std: float


def run_decoder(
    settings: DecoderSettings, folder: Path, device: torch.device, show_progress: bool = True
) -> DecoderReport:
    """Fine-tune a decoder; what is in the folder already is not done again.

    Args:
        settings: what is trained, on what and how long.
        folder: of the run.
        device: where to compute.
        show_progress: draw bars.

    Raises:
        UserError: the model, the data or the folder cannot be used, or the folder holds another run.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    _check_folder(settings, folder)
    pipeline, autoencoder = _load_model(settings.model)
    _to_device(autoencoder, device)
    noise = settings.noise_std if settings.noise_std is not None else _default_noise(pipeline)
    views = _views(settings, folder, show_progress)
    train, heldout = _encoded_splits(autoencoder, views, folder, device, show_progress)
    before = _measure(autoencoder, folder / "before.json", heldout, noise, settings.train, show_progress)
    decoder = DecoderModule(autoencoder).to(device)
    perceptual = load_perceptual(settings.features, device) if settings.loss.perceptual else None
    torch.manual_seed(settings.train.seed)
    task = DecoderTask(
        autoencoder,
        DecoderObjective(decoder, settings.loss, perceptual).to(device),
        train,
        _subset(heldout, settings.heldout),
        noise,
        settings.crop,
        settings.loss,
        settings.train,
    )
    fit(task, settings.train, folder, show_progress)
    trained = load_trainable(str(folder / "model"))
    _to_device(trained, device)
    after = _measure(trained, folder / "after.json", heldout, noise, settings.train, show_progress)
    report = DecoderReport({name: (before[name], after[name]) for name in before}, len(heldout.images), noise)
    files.write_json(folder / "report.json", {**dataclasses.asdict(report), "settings": to_dict(settings)})
    if pipeline is not None:
        _save_pipeline(pipeline, trained, folder, noise)
    return report


def _check_folder(settings: DecoderSettings, folder: Path) -> None:
    """Refuse a folder of another run; how long to train may change."""
    files.check_output_folder(folder)
    path, now = folder / "decoder.json", to_dict(settings)
    before = files.read_json(path) if path.is_file() else now
    changed = [key for key in now if key != "train" and before.get(key, now[key]) != now[key]]
    if changed:
        raise UserError(f"{folder} was started with another {changed[0]}: choose another --output, or undo the change")
    if before.get("train") != now["train"]:
        (folder / "after.json").unlink(missing_ok=True)
    files.write_json(path, now)


def _load_model(source: str) -> tuple[StarFlowPipeline | None, TrainableAutoencoder]:
    """The pipeline, where it is one, and the autoencoder.

    Raises:
        UserError: neither, or a pipeline of pixels.
    """
    folder = Path(source).expanduser()
    config = files.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (not folder.is_dir() and source in BUNDLED) or "autoencoder" in config:
        pipeline = StarFlowPipeline.from_pretrained(source)
        if not isinstance(pipeline.autoencoder, TrainableAutoencoder):
            raise UserError(f"'{source}' is a model of pixels: it has no decoder to train")
        return pipeline, pipeline.autoencoder
    return None, load_trainable(source)


def _to_device(autoencoder: TrainableAutoencoder, device: torch.device) -> None:
    """Move to the device, in the memory layout that is fastest there."""
    autoencoder.network.to(device)
    autoencoder.network.to(memory_format=memory_layout(autoencoder))  # type: ignore[call-overload]


def _default_noise(pipeline: StarFlowPipeline | None) -> float:
    return pipeline.config.noise_std if pipeline is not None else DEFAULT_NOISE


def _views(settings: DecoderSettings, folder: Path, show_progress: bool) -> TrainingViews:
    path = folder / "views.safetensors"
    if not path.is_file():
        config = ViewConfig(size=settings.size, views=settings.views)
        records = read_folder(Path(settings.data).expanduser(), lambda line: tqdm.write(line, file=sys.stderr))
        chosen = [*_of_split(records, "train", settings.pictures), *_of_split(records, "heldout", settings.report)]
        views, skipped = make_views(chosen, config, progress=show_progress, workers=2)
        for one in skipped:
            tqdm.write(f"skipped {one.name}: {one.reason}")
        save_views(path, views)
    return load_views(path)


def _of_split(records: Sequence[ImageRecord], split: str, most: int) -> list[ImageRecord]:
    """At most so many records of a split, spread over it; 0 is all."""
    matching = [record for record in records if record.split == split]
    return [matching[row] for row in evenly_spaced(len(matching), most)]


def _encoded_splits(
    autoencoder: TrainableAutoencoder, views: TrainingViews, folder: Path, device: torch.device, show_progress: bool
) -> tuple[EncodedImages, EncodedImages]:
    """Both splits with their latents, encoded once a run."""
    path = folder / "latents.safetensors"
    if not path.is_file():
        files.write_tensors(path, encode_latents(autoencoder, views.images, device, show_progress))
    tensors = files.read_tensors(path)

    def split(name: str) -> EncodedImages:
        rows = [row for row, one in enumerate(views.splits) if one == name]
        std = tensors["std"][rows] if "std" in tensors else None
        return EncodedImages(views.images[rows], tensors["mean"][rows], std, [views.names[row] for row in rows])

    return split("train"), split("heldout")


def _subset(images: EncodedImages, most: int) -> EncodedImages:
    """At most so many of the images, spread over the set; 0 is all."""
    rows = evenly_spaced(len(images.images), most)
    std = None if images.std is None else images.std[rows]
    names = [images.names[row] for row in rows]
    return EncodedImages(images.images[rows], images.mean[rows], std, names)


@torch.no_grad()
def _measure(
    autoencoder: Autoencoder,
    path: Path,
    heldout: EncodedImages,
    noise: float,
    settings: TrainSettings,
    show_progress: bool,
) -> dict[str, float]:
    """PSNR without and with the noise, and the kernel distance of the noisy reconstructions; kept in `path`."""
    if path.is_file():
        kept: dict[str, float] = files.read_json(path)
        return kept
    device = next(autoencoder.network.parameters()).device
    values: dict[str, list[Tensor]] = {"clean": [], "noisy": []}
    reconstructions: list[Tensor] = []
    starts = range(0, len(heldout.images), EVALUATION_BATCH)
    for start in tqdm(starts, desc=path.stem, unit="batch", disable=not show_progress):
        images = to_float(heldout.images[start : start + EVALUATION_BATCH].to(device))
        latents = heldout.mean[start : start + EVALUATION_BATCH].float()
        draws = [_noise(row, latents) for row in range(start, start + len(latents))]
        with network_precision(settings, device):
            noisy = autoencoder.decode((latents + noise * torch.stack(draws)).to(device))
            clean = autoencoder.decode(latents.to(device))
        values["clean"].append(psnr(clean, images).cpu())
        values["noisy"].append(psnr(noisy, images).cpu())
        reconstructions.append(noisy.cpu())
    measures = {
        "PSNR without noise (dB)": float(torch.cat(values["clean"]).mean()),
        f"PSNR at noise {noise:g} (dB)": float(torch.cat(values["noisy"]).mean()),
    }
    measures |= _kernel_distance(reconstructions, heldout.images, noise, device)
    files.write_json(path, measures)
    return measures


def _noise(row: int, latents: Tensor) -> Tensor:
    return torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(row))


def _kernel_distance(
    reconstructions: list[Tensor], images: Tensor, noise: float, device: torch.device
) -> dict[str, float]:
    """Kernel distance of images to their originals; empty where the features' weights are not installed.

    Raises:
        UserError: the installed weights are damaged.
    """
    if not has_mobilenet():
        return {}
    extractor = load_extractor()
    extractor.network.to(device)
    ours = extract_features(extractor, reconstructions).features
    theirs = extract_features(extractor, (to_float(batch) for batch in images.split(EVALUATION_BATCH))).features
    if len(ours) < 2:
        return {}
    return {f"kid_mobilenetv2 x 1000 at noise {noise:g}": 1000 * kernel_distance(ours, theirs).value}


def _save_pipeline(pipeline: StarFlowPipeline, trained: Autoencoder, folder: Path, noise: float) -> None:
    """Write the pipeline with the new decoder, which removes the noise of its samples."""
    config = dataclasses.replace(pipeline.config, autoencoder=trained.spec, cleaning="decoder")
    whole = StarFlowPipeline(pipeline.flow, trained, pipeline.conditioner, config)
    assert whole.config.autoencoder.noise_std == noise
    whole.save_pretrained(folder / "pipeline")
