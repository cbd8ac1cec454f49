"""Pictures in, pictures out: known pixels untouched, one picture a seed, and a log p that is the pipeline's own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from starflow.conditioning import ClassLabels
from starflow.data.buckets import Aspect
from starflow.data.images import from_pil
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.config import trained_sizes
from starflow.pipeline.likelihood import add_training_noise
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, random_pipeline

BOX = (2, 3, 4, 3)


@pytest.fixture(scope="module")
def pixels() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


@pytest.fixture(scope="module")
def small() -> StarFlowPipeline:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    return random_pipeline("small", SmallLatents(network, 0.2), ClassLabels(CLASSES))


def picture(size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    levels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(levels, "RGB")


def known_equal(one: Image.Image, two: Image.Image, box: tuple[int, int, int, int]) -> bool:
    known = numpy.ones((one.height, one.width), dtype=bool)
    known[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = False
    return bool((numpy.array(one)[known] == numpy.array(two)[known]).all())


@pytest.mark.parametrize("size", [(8, 8), (30, 21)])
def test_a_filling_has_the_pictures_size_its_known_pixels_and_its_own_seed(
    small: StarFlowPipeline, size: tuple[int, int]
) -> None:
    image = picture(size)
    made = small.inpaint(image, prompt="star", box=BOX, num_images=3, seed=4, method="hmc", steps=3, candidates=2)
    assert [one.size for one in made.images] == [size] * 3
    assert all(known_equal(image, one, BOX) for one in made.images)
    assert made.seeds == [4, 5, 6]
    alone = small.inpaint(image, prompt="star", box=BOX, seed=5, method="hmc", steps=3, candidates=2)
    assert torch.equal(alone.latents, made.latents[1:2])
    gap = numpy.array(alone.images[0]).astype(int) - numpy.array(made.images[1])
    assert int(numpy.abs(gap).max()) <= 1
    assert not torch.equal(made.latents[0], made.latents[1])
    with torch.no_grad():
        condition, _ = small._condition(["star"] * 3)
        expected = small.flow.log_prob(made.latents, condition)
    assert torch.allclose(torch.tensor(made.log_prob), expected, atol=1e-3)
    assert all(0 <= value <= 1 for value in made.acceptance)
    assert made.notes[0] == "the box 2,3,4,3 is repainted"
    assert (len(made.notes) == 1) == (size == (8, 8))


@pytest.mark.parametrize(("aspects", "seen"), [(("16:9",), (12, 8)), (("1:1", "16:9", "9:16"), (8, 12))])
def test_a_model_edits_at_sizes_that_it_was_trained_at(
    small: StarFlowPipeline, aspects: tuple[Aspect, ...], seen: tuple[int, int]
) -> None:
    wide = StarFlowPipeline(
        small.flow, small.autoencoder, small.conditioner, dataclasses.replace(small.config, aspects=aspects)
    )
    latent, tall = (seen[1] // 2, seen[0] // 2), picture((20, 36))
    assert seen in trained_sizes(wide.config, wide.flow.config)
    for made in (
        wide.inpaint(tall, box=(0, 0, 19, 36), steps=1, candidates=1),
        wide.edit(tall, "star", "circle"),
        wide.variations(tall, "star", num_images=1),
        wide.interpolate(tall, tall, "star", steps=2),
    ):
        assert made.latents.shape[-2:] == latent
        assert any(f"as {seen[0]}x{seen[1]}" in note for note in made.notes)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("inpaint", {"image": numpy.zeros((8, 8, 3), numpy.uint8)}),
    ("inpaint", {"image": "missing.png"}),
    ("inpaint", {"mask": numpy.ones((8, 8)), "box": None}),
    ("inpaint", {"mask": "missing.png", "box": None}),
    *(("inpaint", {"box": box}) for box in ((0, 0, 4), (0.5, 0, 4, 4), (-1, 0, 4, 4), (0, 0, 0, 4), "0,0,4,4", 3)),
    *(("inpaint", {"prompt": prompt}) for prompt in (None, 3, ["star", "circle"])),
    *(("inpaint", {"guidance": value}) for value in ("1", [1.0, 2.0], float("nan"))),
    *(("inpaint", {name: "1"}) for name in ("temperature", "spread", "steps", "candidates", "feather", "seed")),
    *(("inpaint", {name: 1.5}) for name in ("steps", "candidates", "num_images", "feather", "seed")),
    ("inpaint", {"seed": 2**63 - 1, "num_images": 2}),
    *(("edit", {"strength": value}) for value in ("0.5", [0.1, 0.2], float("nan"), 2.0, True)),
    ("edit", {"new_prompt": None}),
    ("edit", {"image": "missing.png"}),
    ("variations", {"image": None}),
    ("variations", {"strength": "1"}),
    *(("interpolate", {"steps": steps}) for steps in (1, 2.0, "3")),
    ("interpolate", {"image_b": "missing.png"}),
    ("interpolate", {"seed": -3}),
]


@pytest.mark.parametrize(("method", "given"), WRONG, ids=str)
def test_a_wrong_argument_is_one_sentence(small: StarFlowPipeline, method: str, given: dict[str, Any]) -> None:
    image = picture()
    rest: dict[str, Any] = {
        "inpaint": {"image": image, "box": BOX, "steps": 1, "candidates": 1},
        "edit": {"image": image, "prompt": "star", "new_prompt": "circle"},
        "variations": {"image": image, "prompt": "star"},
        "interpolate": {"image_a": image, "image_b": image, "prompt": "star", "steps": 2},
    }[method]
    with pytest.raises(UserError) as raised:
        getattr(small, method)(**{**rest, **given})
    assert "\n" not in str(raised.value)


def test_pictures_and_masks_are_read_alike_from_files_and_from_pillow(small: StarFlowPipeline, tmp_path: Path) -> None:
    """Upright, and 16-bit greys as greys."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((16, 8)).save(tmp_path / "turned.png", exif=exif)
    levels = numpy.zeros((16, 8), dtype=numpy.uint16)
    levels[2:6, 2:6] = 40000
    Image.fromarray(levels).save(tmp_path / "mask.png")
    made = small.inpaint(tmp_path / "turned.png", str(tmp_path / "mask.png"), steps=1, candidates=1)
    with Image.open(tmp_path / "turned.png") as image, Image.open(tmp_path / "mask.png") as mask:
        again = small.inpaint(image, mask, steps=1, candidates=1)
        assert small.edit(image, "star", "star").images[0].size == (8, 16)
    assert made.images[0].size == (8, 16)
    assert made.images[0].tobytes() == again.images[0].tobytes()
    assert made.notes[0] == "the mask repaints what is white, 12.5 % of the picture"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_edits_do_not_depend_on_the_default_precision(small: StarFlowPipeline, dtype: torch.dtype) -> None:
    def edits() -> list[torch.Tensor]:
        filled = small.inpaint(picture(), box=BOX, prompt="star", steps=2, candidates=2, seed=1)
        return [filled.latents, small.edit(picture(), "star", "circle", 0.5).latents]

    plain, before = edits(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert all(torch.equal(one, other) for one, other in zip(plain, edits(), strict=True))
    finally:
        torch.set_default_dtype(before)


def test_pictures_that_differ_under_the_mask_get_the_same_filling(small: StarFlowPipeline) -> None:
    image, other = picture(), picture()
    other.paste((1, 2, 3), (2, 3, 6, 6))
    one, two = (small.inpaint(each, box=BOX, steps=2, candidates=2).images[0] for each in (image, other))
    assert one.tobytes() == two.tobytes()


def test_auto_keeps_the_latents_next_to_a_thin_hole_which_other_methods_draw(small: StarFlowPipeline) -> None:
    """One pixel of a cell of its own: the noised latent of the smoothly filled picture is kept round it."""
    box, latents = (0, 0, 1, 1), []
    for method, cells in (("auto", 1), ("resample", 2)):
        one, two = (
            small.inpaint(picture(), prompt="star", box=box, method=method, guidance=guidance, candidates=2).latents  # type: ignore[arg-type]
            for guidance in (0.0, 2.0)
        )
        moved = ((one - two).abs() > 1e-4).any(1)[0]
        assert moved[0, 0]
        assert int(moved[:cells, :cells].sum()) == int(moved.sum())
        latents.append(one)
    assert torch.equal(latents[0][..., 2:, 2:], latents[1][..., 2:, 2:])


def test_the_mask_may_be_the_pictures_own_transparency(small: StarFlowPipeline) -> None:
    image = picture().convert("RGBA")
    image.paste((0, 0, 0, 0), (2, 3, 6, 6))
    made = small.inpaint(image, steps=1, candidates=1)
    assert "transparent" in made.notes[0]
    assert made.images[0].mode == "RGBA"
    assert known_equal(image, made.images[0], BOX)
    with pytest.raises(UserError, match="no mask: give one"):
        small.inpaint(picture())
    with pytest.raises(UserError, match="both a mask and a box"):
        small.inpaint(picture(), Image.new("L", (8, 8), 255), box=BOX)
    with pytest.raises(UserError, match="inverted it repaints nothing"):
        small.inpaint(picture(), box=(0, 0, 8, 8), invert_mask=True)


def test_a_full_mask_is_a_new_picture_and_one_pixel_is_a_hole(small: StarFlowPipeline) -> None:
    full = small.inpaint(picture(), Image.new("L", (8, 8), 255), steps=1, candidates=1)
    assert not known_equal(picture(), full.images[0], (0, 0, 0, 0))
    dot = small.inpaint(picture(), box=(7, 7, 1, 1), steps=1, candidates=1)
    assert known_equal(picture(), dot.images[0], (7, 7, 1, 1))


def test_an_edit_that_changes_nothing_gives_the_same_latent(pixels: StarFlowPipeline) -> None:
    image = picture()
    same = pixels.edit(image, "star", "star", cleaning="none", feather=0)
    noised = add_training_noise(from_pil(image), pixels.config, [0])
    assert torch.allclose(same.latents, noised, atol=1e-3)
    assert not torch.allclose(pixels.edit(image, "star", "star", guidance=2.0).latents, noised, atol=1e-2)
    assert not torch.allclose(pixels.edit(image, "star", "circle").latents, noised, atol=1e-2)


def test_an_edit_with_a_mask_keeps_the_rest(small: StarFlowPipeline) -> None:
    made = small.edit(picture(), "star", "circle", 0.5, box=BOX, num_images=2)
    assert all(known_equal(picture(), one, BOX) for one in made.images)
    assert made.images[0].tobytes() != made.images[1].tobytes()
    assert all(math.isnan(value) for value in made.acceptance)


def test_variations_are_edits_with_one_prompt(small: StarFlowPipeline) -> None:
    made = small.variations(picture(), "star", 0.4, num_images=2, seed=3)
    assert torch.equal(made.latents, small.edit(picture(), "star", "star", 0.4, num_images=2, seed=3).latents)


def test_the_way_between_pictures_has_both_ends(pixels: StarFlowPipeline) -> None:
    one, two = picture(), picture(seed=1)
    way = pixels.interpolate(one, two, "star", "circle", steps=3, seed=2)
    ends = [pixels.edit(one, "star", "star", seed=2), pixels.edit(two, "circle", "circle", seed=2)]
    assert len(way.images) == len(way.log_prob) == 3
    assert torch.allclose(way.latents[[0, 2]], torch.cat([end.latents for end in ends]), atol=1e-3)
    assert way.log_prob[0] == pytest.approx(ends[0].log_prob[0], abs=0.05)


def test_wrong_numbers_are_told_in_a_line(small: StarFlowPipeline) -> None:
    with pytest.raises(UserError, match="num_images is 0"):
        small.inpaint(picture(), box=BOX, num_images=0)
    with pytest.raises(UserError, match="feather is -1"):
        small.inpaint(picture(), box=BOX, feather=-1)
    with pytest.raises(UserError, match="strength is 2"):
        small.edit(picture(), "star", "star", 2.0)
