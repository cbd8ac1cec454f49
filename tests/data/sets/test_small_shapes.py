"""Drawn shapes: they depend on the arguments alone, and the caption names what is drawn."""

from __future__ import annotations

import pytest
import torch

from starflow.data.sets.small import COLOURS, SHAPES, draw_shapes


def test_a_smaller_set_is_the_beginning_of_a_larger_one() -> None:
    few, many = draw_shapes(7, 16, seed=0), draw_shapes(25, 16, seed=0)
    assert torch.equal(few.images, many.images[:7])
    assert few.captions == many.captions[:7]
    assert many.splits.count("heldout") == 1
    assert len(set(many.names)) == len(many) == 25
    assert not torch.equal(draw_shapes(7, 16, seed=1).images, few.images)


@pytest.mark.parametrize("seed", range(3))
def test_the_caption_names_colour_and_shape(seed: int) -> None:
    views = draw_shapes(24, 64, seed)
    assert views.images.shape == (24, 3, 64, 64)
    for image, caption, label in zip(views.images, views.captions, views.labels, strict=True):
        article, colour, shape = caption.split()
        assert (shape, article) == (label, "an" if colour == "orange" else "a")
        inside = (image.float() - torch.tensor(COLOURS[colour])[:, None, None]).abs().amax(0) < 1
        assert inside.float().mean() > 0.03, "the colour is there"
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        frame = image[:, :2].float()
        assert frame.mean() > 250, "on white, within the frame"
        centre = inside[int(rows.float().mean()), int(columns.float().mean())]
        assert bool(centre) == (shape != "ring"), "only the ring is hollow"
    assert set(views.labels) == set(SHAPES)


def test_the_shapes_fill_their_boxes_by_their_geometry() -> None:
    """Share of the bounding box: a square all, a circle pi / 4, a triangle half."""
    views = draw_shapes(6, 256, seed=0)
    shares = {}
    for image, label in zip(views.images, views.labels, strict=True):
        inside = image.float().mean(0) < 250
        box = len(inside.any(1).nonzero()) * len(inside.any(0).nonzero())
        shares[label] = float(inside.sum()) / box
    assert shares["square"] == pytest.approx(1.0, abs=0.02)
    assert shares["circle"] == pytest.approx(3.1416 / 4, abs=0.02)
    assert shares["triangle"] == pytest.approx(0.5, abs=0.03)
    assert shares["star"] < shares["triangle"] + 0.1
    assert shares["cross"] == pytest.approx(1 - (1 - 0.32) ** 2, abs=0.03)
