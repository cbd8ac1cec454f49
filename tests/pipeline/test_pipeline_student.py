"""A pipeline with a student or a denoiser beside its flow: what they draw, how they are kept, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil, to_pil
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import candidate_noise
from tests.cli.conftest import CLASSES, Run, fails, random_pipeline, with_companions
from tests.cli.conftest import run as run  # a fixture


@pytest.fixture
def pipe() -> StarFlowPipeline:
    """A model of pixels with a student and a denoiser, all of random weights."""
    return with_companions(random_pipeline("both", PixelLatents(), ClassLabels(CLASSES)))


def conditions(pipe: StarFlowPipeline, count: int) -> torch.Tensor:
    assert pipe.conditioner is not None
    return pipe.conditioner.encode(["star"] * count)


def test_a_picture_is_one_pass_of_its_own_noise(pipe: StarFlowPipeline) -> None:
    assert pipe.student is not None
    made = pipe("star", num_images=3, seed=4, guidance=2.0, sampler="student")
    noise = candidate_noise([4, 5, 6], (3, 8, 8), 1)[:, 0]
    clean = pipe.student(0.5 * noise, conditions(pipe, 3), torch.full((3,), 2.0)).clean
    assert torch.allclose(made.latents, clean, atol=1e-5)
    pictures = to_pil(pipe.autoencoder.decode(clean))  # clean already: no way out of the noise is taken
    assert torch.equal(from_pil(made.images[2]), from_pil(pictures[2]))
    alone = pipe("star", seed=6, guidance=2.0, sampler="student")
    assert torch.allclose(alone.latents[0], made.latents[2], atol=1e-5)


def test_of_several_candidates_the_flow_keeps_the_likeliest(pipe: StarFlowPipeline) -> None:
    assert pipe.student is not None
    made = pipe("star", seed=4, sampler="student", candidates=6, temperature=1.0, batch_size=4)
    noise = candidate_noise([4], (3, 8, 8), 7)[0]
    condition = conditions(pipe, 6)
    clean = pipe.student(noise[:6], condition, torch.ones(6)).clean
    with torch.no_grad():
        best = int(pipe.flow.log_prob(clean + 0.1 * noise[6], condition).argmax())
    assert torch.allclose(made.latents[0], clean[best], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "teacher"}, "sampler is 'teacher', expected 'flow' or 'student'"),
        ({"sampler": "student", "solver": "jacobi"}, "solver has no effect with sampler 'student'"),
        ({"sampler": "student", "cleaning": "tweedie"}, "cleaning has no effect with sampler 'student'"),
        ({"sampler": "student", "guidance_rule": "linear"}, "guidance_rule has no effect"),
        ({"sampler": "student", "guidance": 5.0}, "guidance is 5, but the student was trained up to 4"),
    ],
)
def test_what_cannot_be_is_refused(pipe: StarFlowPipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe("star", **options)  # type: ignore[arg-type]


def test_what_the_model_does_not_have_is_named() -> None:
    plain = random_pipeline("plain", PixelLatents(), ClassLabels(CLASSES))
    with pytest.raises(UserError, match="'plain' has none: train one by `starflow train-student`"):
        plain("star", sampler="student")
    with pytest.raises(UserError, match="'plain' has none: train one by `starflow train-denoiser`"):
        plain("star", cleaning="denoiser")


def test_the_folder_holds_both_and_refuses_another_flows(pipe: StarFlowPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    loaded = StarFlowPipeline.from_pretrained(tmp_path / "model")
    for way in ({"sampler": "student"}, {"cleaning": "denoiser"}):
        one, other = (which("star", seed=2, **way).images[0] for which in (pipe, loaded))  # type: ignore[arg-type]
        assert torch.equal(from_pil(one), from_pil(other)), way
    half = tmp_path / "half"  # the same flow in another precision is the same flow
    pipe.save_pretrained(half, torch.bfloat16)
    assert StarFlowPipeline.from_pretrained(half).student is not None
    stranger = random_pipeline("other", PixelLatents(), ClassLabels(CLASSES))
    with torch.no_grad():
        for parameter in stranger.flow.parameters():
            parameter.mul_(1.1)
    stranger.save_pretrained(tmp_path / "other")
    for name in ("student", "denoiser"):
        shutil.copytree(tmp_path / "model" / name, tmp_path / "other" / name)
        with pytest.raises(UserError, match=f"the {name} was trained beside another flow"):
            StarFlowPipeline.from_pretrained(tmp_path / "other")
        shutil.rmtree(tmp_path / "other" / name)


def test_a_denoiser_may_be_the_models_own_way(pipe: StarFlowPipeline) -> None:
    own = pipe("star", seed=1, cleaning="denoiser").images[0]
    pipe.config = dataclasses.replace(pipe.config, cleaning="denoiser")
    assert torch.equal(from_pil(pipe("star", seed=1).images[0]), from_pil(own))
    assert pipe.denoiser is not None
    raw = pipe("star", seed=1).latents
    expected = pipe.autoencoder.decode(raw - 0.1 * pipe.denoiser(raw, conditions(pipe, 1)))
    assert torch.equal(from_pil(to_pil(expected)[0]), from_pil(own))


def test_the_command_says_that_it_is_an_approximation(pipe: StarFlowPipeline, tmp_path: Path, run: Run) -> None:
    pipe.save_pretrained(tmp_path / "model")
    target = tmp_path / "star.png"
    command = ("generate", "--class", "star", "--model", tmp_path / "model", "--output", target)
    assert run(*command, "--sampler", "student").code == 0
    with Image.open(target) as picture:
        texts = picture.info
    assert texts["sampler"] == "student, an approximation of the flow"
    assert (texts["temperature"], texts["candidates"]) == ("0.5", "1")
    assert run(*command, "--overwrite").code == 0
    with Image.open(target) as picture:
        assert "sampler" not in picture.info
    facts = json.loads(run("info", tmp_path / "model", "--json").out)
    assert facts["student"]["temperature"] == 0.5
    assert facts["student"]["teacher"] == pipe.student.config.teacher[:12]  # type: ignore[union-attr]
    assert facts["denoiser"]["noise_std"] == 0.1
    shutil.rmtree(tmp_path / "model" / "student")
    fails(run(*command, "--sampler", "student"), "has none: train one by `starflow train-student`")
    assert "student" not in json.loads(run("info", tmp_path / "model", "--json").out)
