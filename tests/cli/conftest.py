"""Tiny random pipelines, and a way to run a command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from starflow.cli.main import main
from starflow.conditioning import ClassLabels, Conditioner, TextEncoder
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.latents import Autoencoder, PixelLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.denoise import Denoiser, DenoiserConfig
from starflow.sampling.student import Student, StudentConfig, inputs_of
from tests.conditioning.conftest import bert  # noqa: F401  # a fixture

CLASSES = ("circle", "square", "star")


@dataclass(frozen=True)
class Result:
    """What a command line came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `starflow ARGUMENTS`."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


def fails(result: Result, *parts: str) -> None:
    """A user's mistake: exit code 2, one line on stderr that holds `parts`, no traceback and no usage."""
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert len(lines) == 1, result.err
    assert lines[0].startswith("starflow: ")
    for part in parts:
        assert part in lines[0]


def random_pipeline(name: str, autoencoder: Autoencoder, conditioner: Conditioner | None) -> StarFlowPipeline:
    """A flow of two blocks with random weights on pictures of 8x8; sides are multiples of 4."""
    torch.manual_seed(0)
    spec = autoencoder.spec
    config = STARFlowConfig(
        in_channels=spec.channels,
        img_size=8 // spec.factor,
        channels=16,
        patch_size=4 // spec.factor,
        num_blocks=2,
        layers_per_block=1,
        head_dim=16,
        txt_size=conditioner.spec.size if conditioner else 0,
        txt_dim=conditioner.spec.dim if conditioner else 0,
    )
    flow = STARFlow(config)
    for parameter in flow.parameters():  # a new flow is the identity
        torch.nn.init.normal_(parameter, std=0.2)
    return StarFlowPipeline(
        flow,
        autoencoder,
        conditioner,
        PipelineConfig(
            name=name,
            image_size=8,
            noise_std=0.1,
            autoencoder=spec,
            conditioner=conditioner.spec if conditioner else None,
            guidance=1.0 if conditioner else 0.0,
            cleaning="decoder" if spec.noise_std else "tweedie",
        ),
    )


def with_companions(pipeline: StarFlowPipeline) -> StarFlowPipeline:
    """This pipeline with a student and a denoiser beside its flow, of random weights."""
    sizes = inputs_of(pipeline.flow)
    pipeline.student = Student(
        StudentConfig(**sizes, channels=16, layers=(1, 1, 1), head_dim=16, temperature=0.5, largest_guidance=4.0)
    )
    pipeline.denoiser = Denoiser(DenoiserConfig(**sizes, channels=16, layers=(1,), head_dim=16, noise_std=0.1))
    for network in (pipeline.student, pipeline.denoiser):
        for parameter in network.eval().requires_grad_(False).parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return pipeline


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pixels with three classes."""
    folder = tmp_path_factory.mktemp("classes")
    random_pipeline("classes", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:  # noqa: F811
    """A model of a small autoencoder's latents that reads texts of at most 6 tokens."""
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    folder = tmp_path_factory.mktemp("text")
    encoder = TextEncoder.from_pretrained(str(bert), 6)
    random_pipeline("text", SmallLatents(network, 0.1), encoder).save_pretrained(folder)
    return folder
