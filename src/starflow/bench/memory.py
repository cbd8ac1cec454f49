"""The memory that a named model takes is predicted: each way of holding its weights while it samples, and training.

Everything follows from configurations, before any weights are loaded; `starflow.flow.memory` has the arithmetic.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from starflow.config import from_dict
from starflow.data.buckets import Size, sizes_of
from starflow.flow import memory
from starflow.flow.config import PRESETS, ModelConfig, STARFlowConfig, config_from_dict
from starflow.flow.memory import AUTOENCODERS, AutoencoderShape, Precision, Sharding
from starflow.io import files
from starflow.io.hub import HubError, HubOptions, snapshot
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig
from starflow.nn.quantize import WeightFormat
from starflow.pipeline.config import Cleaning, trained_sizes
from starflow.pipeline.folder import DENOISER, STUDENT, read_config
from starflow.pipeline.locate import find_model, is_release
from starflow.published.convert import RELEASES
from starflow.sampling.denoise import Denoiser
from starflow.sampling.student import Companion, Student
from starflow.train.init_from import expected_flow
from starflow.train.recipe import load_recipe

BATCHES = (1, 4, 16, 64)
"""Pictures sampled at once."""


@dataclass(frozen=True)
class MemoryScenario:
    """One way of holding the weights while pictures are drawn."""

    name: str
    dtype: Precision
    weights: WeightFormat | None = None
    offload: bool = False


SCENARIOS = (
    MemoryScenario("float32", "float32"),
    MemoryScenario("bfloat16", "bfloat16"),
    MemoryScenario("int8", "bfloat16", "int8"),
    MemoryScenario("int4", "bfloat16", "int4"),
    MemoryScenario("bfloat16 offload", "bfloat16", offload=True),
    MemoryScenario("int8 offload", "bfloat16", "int8", offload=True),
)

TRAINING_LAYOUTS: tuple[tuple[Sharding, int], ...] = (
    ("replicated", 1),
    ("replicated", 8),
    ("sharded", 8),
    ("hybrid", 64),
    ("sharded", 64),
)
"""How weights lie on the GPUs, and how many there are."""

TRAINING_BATCH = 8
"""Pictures a GPU and pass."""

HOST = "this machine"
"""The name of the memory of the processor."""


def predict_memory(model: str) -> dict[str, Any]:
    """Predicted bytes for a recipe, a preset, a published repository or any model, ready for JSON.

    Of a model on the hub only the configuration is fetched.

    Raises:
        UserError: none of these.
    """
    shape = model_shape(model)
    config, size = shape.config, shape.largest_size
    guided = not isinstance(config, STARFlowConfig) or config.txt_size > 0
    training = [
        {"sharding": sharding, "gpus": gpus, "checkpointing": checkpointing, **_with_peak(prediction)}
        for sharding, gpus in TRAINING_LAYOUTS
        for checkpointing in (False, True)
        for prediction in [
            memory.training_memory(
                config,
                TRAINING_BATCH,
                tokens=shape.tokens(size),
                gpus=gpus,
                sharding=sharding,
                checkpointing=checkpointing,
            )
        ]
    ]
    facts = {
        "model": model,
        "parameters": memory.parameter_count(config),
        "size": f"{size[0]}x{size[1]}",
        "sizes": [f"{width}x{height}" for width, height in shape.sizes],
        "tokens": shape.tokens(size),
        "guided": guided,
    }
    sampling = [_sampling(shape, scenario, batch, guided=guided) for scenario in SCENARIOS for batch in BATCHES]
    facts |= {"available": available(), "text_encoder": shape.text_encoder, "denoised": shape.denoised}
    facts["companions"] = asdict(shape.companions)
    return facts | {"training_batch": TRAINING_BATCH, "sampling": sampling, "training": training}


@dataclass(frozen=True)
class CompanionShape:
    """The networks beside a flow, as far as memory depends on them; they are held in float32."""

    parameters: int = 0
    """Of a student and a denoiser."""
    width: int = 0
    """Of the denoiser that samples are cleaned by; 0 is another way."""

    def pass_bytes(self, tokens: int) -> int:
        """The most that the denoiser's pass holds: states, and of one layer the residual with the MLP's tensors.

        Measured on the bundled model's latents (width 192, 64 pictures): 42.3 MiB, of 41.2 predicted.
        """
        return 4 * 11 * self.width * tokens


@dataclass(frozen=True)
class ModelShape:
    """The part of a pipeline's configuration that its memory depends on."""

    config: ModelConfig
    """Of the flow."""
    autoencoder: AutoencoderShape | None
    """None for a flow alone."""
    text_encoder: str
    """Where it is from; "" is none."""
    denoised: bool
    """Whether samples are cleaned by a Tweedie step."""
    sizes: tuple[Size, ...]
    """(width, height) in pixels that it is trained at, the default one first; of a flow alone those of its input."""
    companions: CompanionShape = CompanionShape()
    """Beside the flow."""

    def tokens(self, size: Size) -> int:
        """Tokens of a picture of a size."""
        unit = self.config.patch_size * (self.autoencoder.factor if self.autoencoder else 1)
        return (size[0] // unit) * (size[1] // unit)

    @property
    def largest_size(self) -> Size:
        """The size of most tokens; ratios of one area differ a little."""
        return max(self.sizes, key=self.tokens)


def model_shape(model: str) -> ModelShape:
    """The parts' shapes, from configurations alone.

    Raises:
        UserError: no recipe, preset, published repository or model of that name.
    """
    if model.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(model))
        config, latents = expected_flow(recipe)
        condition = recipe.conditioning
        encoder = condition.encoder if condition.kind == "text" else ""
        coder = replace(AUTOENCODERS[latents.kind], factor=latents.factor)
        sizes = sizes_of(recipe.data.aspects, recipe.data.side, latents.factor * config.patch_size)
        return ModelShape(config, coder, encoder, denoised=False, sizes=tuple(sizes))
    name = RELEASES[model.partition("@")[0]].preset if is_release(model) else model
    if name in PRESETS:
        known = PRESETS[name]
        coder = AUTOENCODERS["pixels" if known.latents == "pixels" else "diffusers_kl"]
        side = known.config.img_size * coder.factor
        return ModelShape(known.config, coder, known.text, denoised=True, sizes=((side, side),))
    with _configs_of(model) as folder:
        values = files.read_json(folder / "config.json")
        if "autoencoder" not in values:  # a flow alone
            flow = config_from_dict(values)
            return ModelShape(flow, None, "", denoised=False, sizes=((flow.img_size, flow.img_size),))
        flow, pipeline = config_from_dict(files.read_json(folder / "flow" / "config.json")), read_config(folder)
        coder = replace(AUTOENCODERS[pipeline.autoencoder.kind], factor=pipeline.autoencoder.factor)
        own = folder / "autoencoder" / "config.json"
        if pipeline.autoencoder.kind == "small" and own.is_file():
            coder = replace(coder, parameters=_small_parameters(files.read_json(own)))
        companions = _companions(folder, pipeline.cleaning)
    encoder = pipeline.conditioner.source if pipeline.conditioner else ""
    known_sizes = tuple(trained_sizes(pipeline, flow))
    return ModelShape(flow, coder, encoder, pipeline.cleaning == "tweedie", known_sizes, companions)


def _companions(folder: Path, cleaning: Cleaning) -> CompanionShape:
    """Of the student and the denoiser that a model's folder holds, from their configurations."""
    parameters, width = 0, 0
    networks: tuple[type[Companion], ...] = (Student, Denoiser)
    for network in networks:
        path = folder / network.kind / "config.json"
        if path.is_file():
            values = {key: value for key, value in files.read_json(path).items() if key != "kind"}
            config = from_dict(network.config_class, values)
            with torch.device("meta"):
                parameters += sum(one.numel() for one in network(config).parameters())
            width = config.channels if network.kind == cleaning else width
    return CompanionShape(parameters, width)


@contextmanager
def _configs_of(model: str) -> Iterator[Path]:
    """The folder of a model; of one on the hub that is not here, only its configurations, for a while."""
    try:
        folder = find_model(model, HubOptions(offline=True))
    except HubError:
        with tempfile.TemporaryDirectory() as cache:
            wanted = ("config.json", "flow/config.json", f"{STUDENT}/config.json", f"{DENOISER}/config.json")
            yield snapshot(model, wanted, required=["config.json"], hub=HubOptions(cache=cache))
        return
    yield folder


def _sampling(shape: ModelShape, scenario: MemoryScenario, batch: int, *, guided: bool) -> dict[str, Any]:
    """One row: bytes on the device that computes, and what a CPU holds beside it."""
    tokens = shape.tokens(shape.largest_size)
    found = memory.sampling_memory(
        shape.config,
        batch,
        tokens=tokens,
        guided=guided,
        dtype=scenario.dtype,
        weights=scenario.weights,
        offload=scenario.offload,
        autoencoder=shape.autoencoder,
        text_encoder=shape.text_encoder,
        denoised=shape.denoised,
    )
    if shape.companions.parameters:
        read = batch * (tokens + (shape.config.txt_size if isinstance(shape.config, STARFlowConfig) else 0))
        cleaned = max(found.denoising, shape.companions.pass_bytes(read))
        found = replace(found, denoising=cleaned, companions=4 * shape.companions.parameters)
    return {"kind": scenario.name, "batch": batch, **_with_peak(found), "cpu_peak": found.cpu_peak}


def _small_parameters(values: dict[str, Any]) -> int:
    """Parameters of one of our own autoencoders, counted on a model without memory."""
    known = {field.name for field in fields(SmallAutoencoderConfig)}
    config = from_dict(SmallAutoencoderConfig, {name: value for name, value in values.items() if name in known})
    with torch.device("meta"):
        return sum(one.numel() for one in SmallAutoencoder(config).parameters())


def _with_peak(prediction: memory.SamplingMemory | memory.TrainingMemory) -> dict[str, int]:
    return {**asdict(prediction), "peak": prediction.peak}


def available() -> dict[str, int]:
    """Bytes of memory of this machine and its first GPU, whether in use or not."""
    sizes = {}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes[HOST] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        sizes[torch.cuda.get_device_name(0)] = torch.cuda.get_device_properties(0).total_memory
    return sizes
