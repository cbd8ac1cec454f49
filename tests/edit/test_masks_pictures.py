"""Known pixels come back bit for bit, at any size, and what lies under the mask reaches nothing."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.edit.masks import Scene, box_mask, crop_round, nearness, spread_known


def noise_picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode)
    levels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=numpy.uint8)
    return Image.fromarray(levels, mode)


boxes = st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(1, 70), st.integers(1, 50))


@settings(max_examples=30, deadline=None)
@given(boxes, st.sampled_from([(61, 41), (200, 90), (70, 130)]), st.sampled_from([(8, 8), (64, 64), (40, 24)]))
def test_a_crop_holds_the_hole_and_lies_in_the_picture(
    box: tuple[int, int, int, int], size: tuple[int, int], seen: tuple[int, int]
) -> None:
    hole = box_mask(box, size)
    crop = crop_round(hole, seen)
    assert int(crop.of(hole).sum()) == int(hole.sum())
    assert 0 <= crop.left <= size[0] - crop.width
    assert 0 <= crop.top <= size[1] - crop.height
    assert crop.width == size[0] or crop.width >= seen[0]
    assert crop.height == size[1] or crop.height >= seen[1]
    if crop.width < size[0] and crop.height < size[1]:
        assert abs(crop.width * seen[1] - crop.height * seen[0]) <= sum(seen)  # the same ratio, but for rounding


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(64, 64), (150, 40), (24, 90)])
def test_known_pixels_come_back_bit_for_bit_ten_times_over(mode: str, size: tuple[int, int]) -> None:
    first = picture = noise_picture(size, mode)
    hole = box_mask((7, 9, 12, 20), size)
    for seed in range(10):
        scene = Scene.of(picture, hole, [(64, 64)], 8)
        filled = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        picture = scene.paste(filled, feather=3)
    before, after = numpy.array(first), numpy.array(picture)
    known = ~hole[0, 0].numpy()
    assert picture.size == size
    assert numpy.array_equal(before[known], after[known])
    assert not numpy.array_equal(before[~known], after[~known])


@pytest.mark.parametrize("size", [(64, 64), (150, 40)])
def test_what_lies_under_the_mask_reaches_nothing(size: tuple[int, int]) -> None:
    picture, hole = noise_picture(size), box_mask((7, 9, 12, 20), size)
    other = picture.copy()
    other.paste(noise_picture((12, 20), seed=1), (7, 9))
    one, two = (Scene.of(each, hole, [(64, 64)], 8) for each in (picture, other))
    filled = torch.zeros(1, 3, 64, 64)
    assert torch.equal(one.seen, two.seen)
    assert one.paste(filled, 3).tobytes() == two.paste(filled, 3).tobytes()
    kept = Scene.of(other, hole, [(64, 64)], 8, keep=True)
    assert not torch.equal(kept.seen, Scene.of(picture, hole, [(64, 64)], 8, keep=True).seen)


def test_a_picture_of_the_models_size_is_seen_as_it_is_and_another_is_said() -> None:
    whole = Scene.of(noise_picture((64, 64)), box_mask((1, 1, 2, 2), (64, 64)), [(64, 64)], 8)
    assert whole.said == ""
    large = Scene.of(noise_picture((300, 200)), box_mask((100, 90, 50, 20), (300, 200)), [(64, 64)], 8)
    assert large.said == "the picture is 300x200; the model sees its 100x100 at 75,50, as 64x64"


@pytest.mark.parametrize(
    ("picture", "box", "seen"),
    [
        ((300, 300), (10, 10, 40, 20), (64, 64)),  # the picture reaches far enough for the default size
        ((88, 48), (0, 0, 88, 48), (88, 48)),  # as it is
        ((40, 90), (3, 3, 30, 80), (48, 88)),
        ((500, 400), (0, 0, 500, 400), (72, 56)),
    ],
)
def test_a_model_of_several_sizes_sees_the_one_that_bends_the_picture_least(
    picture: tuple[int, int], box: tuple[int, int, int, int], seen: tuple[int, int]
) -> None:
    sizes = [(64, 64), (88, 48), (72, 56), (48, 88)]
    scene = Scene.of(noise_picture(picture), box_mask(box, picture), sizes, 8)
    assert scene.seen.shape[-2:] == (seen[1], seen[0])
    assert scene.latent_hole.shape[-2:] == (seen[1] // 8, seen[0] // 8)
    assert (scene.said == "") == (picture == seen)
    assert scene.paste(scene.seen, 0).size == picture


def test_the_edge_of_the_hole_takes_off_the_decoders_error_and_its_middle_does_not() -> None:
    picture = Image.new("RGB", (64, 64), (100, 100, 100))
    scene = Scene.of(picture, box_mask((16, 16, 32, 32), (64, 64)), [(64, 64)], 8)
    made = numpy.array(scene.paste(torch.full((1, 3, 64, 64), 0.0), feather=3))[..., 0].astype(int)
    assert made[32, 16:21].tolist() == [107, 114, 121, 128, 128]
    plain = numpy.array(scene.paste(torch.full((1, 3, 64, 64), 0.0), feather=0))[..., 0]
    assert int(plain[32, 16]) == 128


def test_known_values_are_spread_into_the_rest_and_stay() -> None:
    values = torch.rand(1, 2, 9, 40)
    known = torch.zeros(1, 1, 9, 40, dtype=torch.bool)
    known[..., :3] = True
    filled = spread_known(values, known)
    assert torch.equal(filled[..., :3], values[..., :3])
    low, high = values[..., :3].amin((2, 3)), values[..., :3].amax((2, 3))
    assert bool((filled.amin((2, 3)) >= low - 1e-5).all())
    assert bool((filled.amax((2, 3)) <= high + 1e-5).all())
    assert bool((spread_known(values, ~known & False) == 0).all())


def test_nearness_falls_from_one_on_known_pixels_to_zero() -> None:
    known = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    known[..., 0] = True
    assert nearness(known, 3).flatten().tolist() == [1, 0.75, 0.5, 0.25, 0, 0]
