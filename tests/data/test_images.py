"""Images to tensors and back, and files that are no images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starflow.data.images import (
    ImageError,
    decode_image,
    dequantise,
    from_pil,
    image_errors,
    make_grid,
    on_background,
    open_image,
    png_log_prob,
    read_image_size,
    resize_crop,
    save_png,
    to_float,
    to_pil,
    to_uint8,
)
from starflow.errors import UserError


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_levels_survive_conversion_and_dequantisation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (1, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images = to_float(levels)
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(to_uint8(images), levels)
    noise = torch.rand(levels.shape, generator=generator)
    noise[:, 0] = torch.nextafter(torch.ones(1), torch.zeros(1))  # the largest that can be drawn
    noisy = dequantise(images.half(), noise)
    assert noisy.min() >= -1
    assert noisy.max() < 1
    assert torch.equal(((noisy + 1) * 128).floor().to(torch.uint8), levels), "the level is what the noise leaves"
    torch.testing.assert_close((noisy + 1) * 128 - levels, noise, rtol=0, atol=1e-4)


def test_images_become_pil_and_tensors_again() -> None:
    images = to_float(torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8))
    assert [image.size for image in to_pil(images)] == [(7, 5)] * 2
    assert torch.equal(torch.cat([from_pil(image) for image in to_pil(images)]), images)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0)).convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert (from_pil(image).min() == 1) == (mode not in ("L", "RGB"))


def test_a_grid_has_gaps_and_rows() -> None:
    sheet = make_grid(-torch.ones(3, 3, 4, 6), columns=2, gap=1)
    assert sheet.size == (13, 9)
    black = np.asarray(sheet)[..., 0] == 0
    expected = np.zeros((9, 13), dtype=bool)
    expected[:4, :6] = expected[:4, 7:] = expected[5:, :6] = True
    np.testing.assert_array_equal(black, expected)


def test_a_png_carries_its_text(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (3, 2), "red"), tmp_path / "a.png", {"prompt": "ein Apfel", "seed": "7"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "ein Apfel", "seed": "7"}  # type: ignore[attr-defined]
        assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "png", "avif"])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    if path.suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow writes no {suffix}")
    image.save(path, exif=exif)
    assert open_image(path).size == ((4, 8) if orientation > 4 else (8, 4))
    assert read_image_size(path, "a") == read_image_size(path.read_bytes(), "a") == open_image(path).size


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def damaged(path: Path) -> None:
    truncated(path)
    data = bytearray(path.read_bytes())
    data[40:60] = b"\xff" * 20
    path.write_bytes(bytes(data))


def no_image(path: Path) -> None:
    path.write_text("not a picture")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("spoil", [truncated, damaged, no_image, empty])
def test_bad_pictures_are_named(tmp_path: Path, spoil: Callable[[Path], None], suffix: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    spoil(path)
    with pytest.raises(ImageError, match=rf"bad\.{suffix} is not a readable image") as caught:
        open_image(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_modes_become_rgb_or_rgba(tmp_path: Path) -> None:
    grey16 = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    grey16.save(tmp_path / "grey16.png")
    opened = open_image(tmp_path / "grey16.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (128, 128, 128)
    whole = Image.fromarray(np.full((4, 4), 200, dtype=np.int32))  # an array of 8-bit levels
    assert from_pil(whole).unique().tolist() == from_pil(whole.convert("L")).unique().tolist()
    assert from_pil(Image.fromarray(np.full((4, 4), 200 * 256, dtype=np.int32))).equal(from_pil(whole))
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    assert open_image(tmp_path / "cmyk.jpg").mode == "RGB"
    palette = Image.new("P", (4, 4))
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_image(tmp_path / "palette.png").mode == "RGBA"


def test_a_large_jpeg_comes_reduced_but_not_below_the_side(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((800, 600)).convert("RGB").save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert decode_image(data, "a").size == (800, 600)
    reduced = decode_image(data, "a", side=140)
    assert reduced.size == (200, 150)
    small = np.asarray(decode_image(data, "a").resize((200, 150)), dtype=float)
    assert np.abs(np.asarray(reduced, dtype=float) - small).mean() < 2


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 8)


def test_resize_crop_takes_the_centre_and_averages() -> None:
    stripes = np.zeros((40, 80, 3), dtype=np.uint8)
    stripes[:, 20:60:2] = 255
    small = np.asarray(resize_crop(Image.fromarray(stripes), 10))
    assert small.shape == (10, 10, 3)
    assert np.abs(small[:, 2:-2].astype(int) - 128).max() < 12, "antialiased, not picked"


def test_transparency_is_laid_on_the_colour() -> None:
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert on_background(image, (0, 0, 255)).getpixel((0, 0)) == pytest.approx((128, 0, 127), abs=1)


def test_greys_of_floats_keep_their_range(tmp_path: Path) -> None:
    for name, scale in (("unit", 1 / 255), ("bytes", 1.0), ("sixteen", 256.0)):
        values = np.array([[0, 51, 204, 255]], dtype=np.float32) * np.float32(scale)
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        grey = np.asarray(open_image(tmp_path / f"{name}.tif"))[0, :, 0]
        assert grey.tolist() == [0, 51, 204, 255], name


@pytest.mark.parametrize("error", [KeyError("x"), OverflowError("too large"), MemoryError(), RecursionError("deep")])
def test_whatever_an_image_raises_names_it(error: Exception) -> None:
    message = r"^a\.png is not a readable image \(.+\): replace it or remove it$"
    with pytest.raises(ImageError, match=message), image_errors(Path("a.png")):
        raise error
    with pytest.raises(KeyboardInterrupt), image_errors(Path("a.png")):
        raise KeyboardInterrupt


def test_png_as_a_distribution() -> None:
    """Noise has the probability of its bits, a channel of greys a third of it, and no picture that of another."""
    noise = torch.randint(0, 256, (2, 3, 48, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey, flat = noise[:1, :1].expand(1, 3, -1, -1), torch.full((1, 3, 48, 40), 7, dtype=torch.uint8)
    bits = -png_log_prob(torch.cat([noise, grey, flat])) / np.log(2)
    values = 48 * 40 * 8
    assert bits.shape == (4,)
    assert all(3 * values < one < 3.1 * values for one in bits[:2].tolist())
    assert values < bits[2] < 1.1 * values
    assert 0 < bits[3] < 0.1 * values
    assert torch.equal(png_log_prob(grey), -bits[2:3] * np.log(2))  # whatever its company
    with pytest.raises(UserError, match=r"expected \(N, 3, H, W\) of torch.uint8"):
        png_log_prob(to_float(noise))
