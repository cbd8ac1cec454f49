"""What callers hand to a pipeline works as meant, or is one sentence before anything is computed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starflow import STARFlow, denoise, sample
from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil
from starflow.errors import UserError
from starflow.flow.checkpoint import assign_weights
from starflow.flow.config import STARFlowConfig
from starflow.io import weights
from starflow.latents import PixelLatents
from starflow.pipeline.inputs import check_prompts, check_seeds, check_whole, read_image
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import noise_from_seeds
from tests.cli.conftest import CLASSES, random_pipeline
from tests.registry import randomised


@pytest.fixture(scope="module")
def pipe() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


WRONG_CALLS: list[dict[str, Any]] = [
    {"prompt": None},
    {"prompt": ["star", 3]},
    {"prompt": b"star"},
    {"prompt": []},
    {"num_images": 0},
    {"num_images": 1.5},
    {"batch_size": 0},
    {"seed": -1},
    {"seed": 1.0},
    {"seed": 2**63 - 1, "num_images": 2},
    {"size": 64},
    {"size": "8x8"},
    {"size": (8, 8, 8)},
    {"size": (8.0, 8)},
    {"tile": 0},
    {"tile": 2.5},
    {"cleaning": "foo"},
    {"candidates": 0},
    {"candidates": 1.5},
    {"temperature": "warm"},
    {"temperature": [0.5, 0.6]},
    {"temperature": torch.tensor([0.5, 0.6])},
    {"guidance": True},
    {"prompt": {"star": 1}},
    {"prompt": {"star"}},
    {"prompt": "a \ud800 star"},
    {"not_finite": "foo"},
    {"solver": None},
    {"guidance": "strong"},
    {"guidance": [1.0, None]},
    {"guidance": float("nan")},
    {"solver": "fast"},
]


@pytest.mark.parametrize("given", WRONG_CALLS, ids=str)
def test_a_call_that_is_wrong_is_one_sentence(pipe: StarFlowPipeline, given: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        pipe(**{"prompt": "star", **given})
    assert len(str(caught.value).splitlines()) == 1


def test_one_text_is_the_prompt_of_all(pipe: StarFlowPipeline) -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    one, _ = pipe.log_probs(images, "star", [0, 1, 2])
    each, _ = pipe.log_probs(images, ["star"] * 3, [0, 1, 2])
    assert torch.equal(one, each)
    maps = pipe.log_prob_maps(images, "star", [0, 1, 2])
    torch.testing.assert_close(maps.sum((1, 2)), one)
    assert not torch.allclose(one, pipe.log_probs(images, "circle", [0, 1, 2])[0])


@pytest.mark.parametrize(
    ("prompts", "seeds", "words"),
    [
        ("star", [0], "1 seeds for 3 pictures"),
        ("star", 0, "expected one for each of 3 pictures"),
        ("star", [0, 1, 2, 3], "4 seeds for 3 pictures"),
        (["star"], [0, 1, 2], "1 prompts for 3 pictures"),
        (["star", "star", None], [0, 1, 2], "a prompt is None"),
        ("star", [0, 1, -1], "the seed is -1"),
    ],
)
def test_not_one_for_each_is_refused(pipe: StarFlowPipeline, prompts: Any, seeds: Any, words: str) -> None:
    for method in (pipe.log_probs, pipe.log_prob_maps):
        with pytest.raises(UserError, match=words):
            method(torch.zeros(3, 3, 8, 8), prompts, seeds)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), np.zeros((1, 3, 8, 8)), None, [0.0]])
def test_pictures_that_are_no_tensor_of_floats_are_refused(pipe: StarFlowPipeline, images: Any) -> None:
    with pytest.raises(UserError, match=r"expected a tensor of floats in \[-1, 1\]"):
        pipe.log_probs(images, "star", [0])


@pytest.mark.parametrize(("scale", "shift", "words"), [(255, 0, "reach 2"), (1, 0, r"lie in \[0"), (2, -1, "")])
def test_another_range_is_a_warning(pipe: StarFlowPipeline, scale: float, shift: float, words: str) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.log_probs(images, "star", [0, 1])
    assert [str(one.message).count("\n") for one in caught] == [0] * bool(words)
    assert not words or words[:3] in str(caught[0].message)


@pytest.mark.parametrize("levels", [(128, 255), (250, 255)])
def test_a_bright_picture_is_not_taken_for_one_of_another_range(
    pipe: StarFlowPipeline, levels: tuple[int, int]
) -> None:
    shades = torch.randint(*levels, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.log_prob(Image.fromarray(shades.numpy()), "star", seed=0)
    with pytest.warns(UserWarning, match="2 x - 1"):
        pipe.log_probs(shades.permute(2, 0, 1)[None] / 255, "star", [0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_of_floats_works(pipe: StarFlowPipeline, dtype: torch.dtype) -> None:
    images = (torch.rand(2, 3, 8, 8) * 2 - 1).to(dtype)
    assert torch.equal(*(pipe.log_probs(given, "star", [0, 1])[0] for given in (images, images.float())))
    noise = torch.randn(2, 3, 8, 8).to(dtype)
    condition = pipe._condition(["star"] * 2)[0]
    assert condition is not None
    assert torch.equal(*(sample(pipe.flow, given, condition) for given in (noise, noise.float())))
    decoded = pipe.decode(noise[:1], "star")
    assert isinstance(decoded, Image.Image)


def test_numbers_of_numpy_and_torch_are_numbers(pipe: StarFlowPipeline) -> None:
    plain = pipe("star", seed=3, temperature=0.5, guidance=1.0).latents
    numbers: list[tuple[Any, Any]] = [(np.int64(3), np.float32(0.5)), (torch.tensor(3), torch.tensor(0.5))]
    for whole, real in numbers:
        made = pipe("star", seed=whole, temperature=real, guidance=torch.tensor(1.0))
        assert torch.equal(made.latents, plain)
        assert made.seeds == [3]
    assert torch.equal(noise_from_seeds(list(np.arange(3, 5)), (2, 2)), noise_from_seeds([3, 4], (2, 2)))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, 3, 8, 8).to_sparse()])
def test_tensors_without_values_are_refused(pipe: StarFlowPipeline, images: torch.Tensor) -> None:
    for call in (pipe.log_probs, pipe.log_prob_maps):
        with pytest.raises(UserError, match="expected a dense one with values"):
            call(images, "star", [0])


def test_an_empty_batch_works(pipe: StarFlowPipeline) -> None:
    empty, none = torch.zeros(0, 3, 8, 8), torch.zeros(0, 1, 4)
    assert pipe.log_probs(empty, [], [])[0].shape == (0,)
    assert sample(pipe.flow, empty, none).shape == empty.shape
    assert pipe.flow.log_prob(empty, none).shape == (0,)
    assert pipe.decode(empty) == []


def test_several_z_are_as_many_pictures(pipe: StarFlowPipeline) -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "navy")]
    z = torch.cat([pipe.encode(image, name) for image, name in zip(images, ("star", "circle"), strict=True)])
    decoded = pipe.decode(z, ["star", "circle"])
    assert isinstance(decoded, list)
    for image, found in zip(images, decoded, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(found)).max() <= 1


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 2, 4, 4, dtype=torch.uint8), np.zeros((1, 2, 4, 4)), None, [0.0], "x.png"]
)
def test_flows_take_tensors_of_floats_alone(x: Any) -> None:
    model = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    for call in (model, model.log_prob, lambda x: sample(model, x), lambda x: denoise(model, x)):
        with pytest.raises(UserError, match="expected"):
            call(x)


def test_a_picture_is_read_alike_from_a_file_and_from_pillow(pipe: StarFlowPipeline, tmp_path: Path) -> None:
    """16-bit greys, EXIF turns, colour keys: what training reads."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray((rng.random((8, 8)) * 65535).astype(np.uint16))
    grey.save(tmp_path / "grey.png")
    turned = Image.fromarray((rng.random((8, 8, 3)) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "keyed.png", transparency=turned.getpixel((0, 0)))
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            assert torch.equal(read_image(opened), read_image(path)), path.name
            assert pipe.log_prob(opened, "star") == pipe.log_prob(str(path), "star")
    assert from_pil(grey).std() > 0.3, "not clipped to white"


@pytest.mark.parametrize("image", [None, np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), "missing.png", 3])
def test_what_is_no_picture_is_one_sentence(pipe: StarFlowPipeline, image: Any) -> None:
    for call in (pipe.log_prob, pipe.encode):
        with pytest.raises(UserError):
            call(image, "star")


@given(st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=2), st.integers(-3, 3)))
def test_whole_numbers_are_whole(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        assert check_whole("n", value) == value
    else:
        with pytest.raises(UserError, match="^n is "):
            check_whole("n", value)


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 4))
def test_as_many_seeds_and_prompts_as_pictures(seeds: list[int], count: int) -> None:
    if len(seeds) == count:
        assert check_seeds(seeds, count) == seeds
        assert check_prompts(map(str, seeds), count) == list(map(str, seeds))
        return
    with pytest.raises(UserError, match=f"{len(seeds)} seeds for {count}"):
        check_seeds(seeds, count)
    with pytest.raises(UserError, match=f"{len(seeds)} prompts for {count}"):
        check_prompts(map(str, seeds), count)


def test_tied_weights_are_written_and_whole_numbers_refused(tmp_path: Path) -> None:
    model = randomised(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16), 0)
    first, second = model.iter_blocks()
    first.proj_in.weight = second.proj_in.weight
    model.save_pretrained(tmp_path)
    again = STARFlow.from_pretrained(tmp_path)
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    tensors = weights.read(tmp_path)
    tensors["blocks.0.proj_in.weight"] = tensors["blocks.0.proj_in.weight"].long()
    with pytest.raises(UserError, match=r"of whole numbers: blocks\.0\.proj_in\.weight \(int64\)"):
        assign_weights(again, tensors, "there")
