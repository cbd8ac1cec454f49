"""A decoder's training run: pictures, their latents, the training, the report, and the pipeline that uses it.

RUN/decoder.json   the settings         RUN/views.safetensors, RUN/latents.safetensors   pictures and their latents
RUN/log.jsonl, samples/, checkpoints/, best/, model/   as any training; RUN/report.json: before and after
RUN/pipeline/      the pipeline it was started from, where it was one, with the new decoder
"""

from __future__ import annotations

import dataclasses
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
from starflow.evaluate import extract, kernel_distance, load_extractor, psnr
from starflow.io import files
from starflow.latents import Autoencoder
from starflow.latents.load import DecoderModule, TrainableAutoencoder, load_trainable, memory_layout
from starflow.pipeline.locate import BUNDLED
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.loop import fit
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.decoder import (
    DecoderLoss,
    DecoderObjective,
    DecoderTask,
    LatentPictures,
    PerceptualName,
    encode_pictures,
    load_perceptual,
)

DEFAULT_NOISE = 0.3


@dataclass(frozen=True)
class DecoderSettings:
    """What a run is told; see `starflow train-decoder --help`."""

    model: str
    data: str
    train: TrainSettings
    noise_std: float | None = None
    """None is the pipeline's, or 0.3."""
    size: int = 128
    crop: int = 64
    views: int = 1
    pictures: int = 0
    """Pictures of the training, at most, spread over the set; 0 is all."""
    report: int = 0
    """Held-out pictures of the report, at most; 0 is all."""
    heldout: int = 64
    """Held-out pictures of the evaluations on the way."""
    features: PerceptualName = "mobilenetv2"
    loss: DecoderLoss = field(default_factory=DecoderLoss)


@dataclass(frozen=True)
class DecoderReport:
    """On the held-out pictures: each measure's value with the old decoder and with the new one."""

    measures: dict[str, tuple[float, float]]
    count: int
    noise_std: float


def run_decoder(
    settings: DecoderSettings, folder: Path, device: torch.device, show_progress: bool = True
) -> DecoderReport:
    """Run what is missing of it.

    Raises:
        UserError: the model, the data or the folder cannot be used, or the folder holds another run.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    _start(settings, folder)
    pipeline, autoencoder = _open(settings.model)
    _place(autoencoder, device)
    noise = settings.noise_std if settings.noise_std is not None else _usual_noise(pipeline)
    views = _views(settings, folder, show_progress)
    train, heldout = _pictures(autoencoder, views, folder, device, show_progress)
    before = _measured(autoencoder, folder / "before.json", heldout, noise, settings.train, show_progress)
    decoder = DecoderModule(autoencoder).to(device)
    perceptual = load_perceptual(settings.features, device) if settings.loss.perceptual else None
    torch.manual_seed(settings.train.seed)
    task = DecoderTask(
        autoencoder,
        DecoderObjective(decoder, settings.loss, perceptual).to(device),
        train,
        _some(heldout, settings.heldout),
        noise,
        settings.crop,
        settings.loss,
        settings.train,
    )
    fit(task, settings.train, folder, show_progress)
    trained = load_trainable(str(folder / "model"))
    _place(trained, device)
    after = _measured(trained, folder / "after.json", heldout, noise, settings.train, show_progress)
    report = DecoderReport({name: (before[name], after[name]) for name in before}, len(heldout.images), noise)
    files.write_json(folder / "report.json", {**dataclasses.asdict(report), "settings": to_dict(settings)})
    if pipeline is not None:
        _save_pipeline(pipeline, trained, folder, noise)
    return report


def _start(settings: DecoderSettings, folder: Path) -> None:
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


def _open(source: str) -> tuple[StarFlowPipeline | None, TrainableAutoencoder]:
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


def _place(autoencoder: TrainableAutoencoder, device: torch.device) -> None:
    """To the device, in the layout that is fastest there."""
    autoencoder.network.to(device)
    autoencoder.network.to(memory_format=memory_layout(autoencoder))  # type: ignore[call-overload]


def _usual_noise(pipeline: StarFlowPipeline | None) -> float:
    return pipeline.config.noise_std if pipeline is not None else DEFAULT_NOISE


def _views(settings: DecoderSettings, folder: Path, show_progress: bool) -> TrainingViews:
    path = folder / "views.safetensors"
    if not path.is_file():
        config = ViewConfig(size=settings.size, views=settings.views)
        records = read_folder(Path(settings.data).expanduser())
        some = [*_of_split(records, "train", settings.pictures), *_of_split(records, "heldout", settings.report)]
        views, skipped = make_views(some, config, progress=show_progress, workers=2)
        for one in skipped:
            tqdm.write(f"skipped {one.name}: {one.reason}")
        save_views(path, views)
    return load_views(path)


def _of_split(records: Sequence[ImageRecord], split: str, most: int) -> list[ImageRecord]:
    """At most so many pictures of a split, spread over it; 0 is all."""
    found = [record for record in records if record.split == split]
    return [found[row] for row in _spread(len(found), most or len(found))]


def _spread(count: int, most: int) -> list[int]:
    return [row * count // most for row in range(most)] if most < count else list(range(count))


def _pictures(
    autoencoder: TrainableAutoencoder, views: TrainingViews, folder: Path, device: torch.device, show_progress: bool
) -> tuple[LatentPictures, LatentPictures]:
    """Both splits with their latents, encoded once a run."""
    path = folder / "latents.safetensors"
    if not path.is_file():
        files.write_tensors(path, encode_pictures(autoencoder, views.images, device, show_progress))
    tensors = files.read_tensors(path)

    def split(name: str) -> LatentPictures:
        rows = [row for row, one in enumerate(views.splits) if one == name]
        std = tensors["std"][rows] if "std" in tensors else None
        return LatentPictures(views.images[rows], tensors["mean"][rows], std, [views.names[row] for row in rows])

    return split("train"), split("heldout")


def _some(pictures: LatentPictures, most: int) -> LatentPictures:
    """At most so many, spread over the set."""
    rows = _spread(len(pictures.images), most)
    std = None if pictures.std is None else pictures.std[rows]
    names = [pictures.names[row] for row in rows]
    return LatentPictures(pictures.images[rows], pictures.mean[rows], std, names)


@torch.no_grad()
def _measured(
    autoencoder: Autoencoder,
    path: Path,
    pictures: LatentPictures,
    noise: float,
    settings: TrainSettings,
    show_progress: bool,
) -> dict[str, float]:
    """PSNR without and with the noise, and the kernel distance of the noisy reconstructions; kept in `path`."""
    if path.is_file():
        found: dict[str, float] = files.read_json(path)
        return found
    device = next(autoencoder.network.parameters()).device
    values: dict[str, list[Tensor]] = {"clean": [], "noisy": []}
    made: list[Tensor] = []
    starts = range(0, len(pictures.images), 16)
    for start in tqdm(starts, desc=path.stem, unit="batch", disable=not show_progress):
        images = to_float(pictures.images[start : start + 16].to(device))
        latents = pictures.mean[start : start + 16].float()
        draws = [_noise(row, latents) for row in range(start, start + len(latents))]
        with network_precision(settings, device):
            noisy = autoencoder.decode((latents + noise * torch.stack(draws)).to(device))
            clean = autoencoder.decode(latents.to(device))
        values["clean"].append(psnr(clean, images).cpu())
        values["noisy"].append(psnr(noisy, images).cpu())
        made.append(noisy.cpu())
    measures = {
        "PSNR without noise (dB)": float(torch.cat(values["clean"]).mean()),
        f"PSNR at noise {noise:g} (dB)": float(torch.cat(values["noisy"]).mean()),
    }
    measures |= _kernel_distance(made, pictures.images, noise, device)
    files.write_json(path, measures)
    return measures


def _noise(row: int, latents: Tensor) -> Tensor:
    return torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(row))


def _kernel_distance(made: list[Tensor], images: Tensor, noise: float, device: torch.device) -> dict[str, float]:
    """Kernel distance of pictures to their originals, where the features' weights are installed."""
    try:
        extractor = load_extractor()
    except UserError:
        return {}
    extractor.network.to(device)
    ours = extract(extractor, made).features
    theirs = extract(extractor, (to_float(some) for some in images.split(16))).features
    if len(ours) < 2:
        return {}
    return {f"kid_mobilenetv2 x 1000 at noise {noise:g}": 1000 * kernel_distance(ours, theirs).value}


def _save_pipeline(pipeline: StarFlowPipeline, trained: Autoencoder, folder: Path, noise: float) -> None:
    """The pipeline with the new decoder as its way out of the noise."""
    config = dataclasses.replace(pipeline.config, autoencoder=trained.spec, cleaning="decoder")
    whole = StarFlowPipeline(pipeline.flow, trained, pipeline.conditioner, config)
    assert whole.config.autoencoder.noise_std == noise
    whole.save_pretrained(folder / "pipeline")
