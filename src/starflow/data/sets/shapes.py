"""Coloured shapes with captions, drawn when asked for: a data set for trying a recipe without any download."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy
import torch

from starflow.data.views import TrainingViews

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (140, 60, 170),
    "orange": (245, 140, 30),
    "black": (30, 30, 30),
    "pink": (245, 140, 180),
}

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def draw_shapes(count: int, size: int, seed: int) -> TrainingViews:
    """Draw `count` images (3, size, size), such as "a red circle"; every twentieth is held out.

    The result depends on the arguments alone.

    >>> views = draw_shapes(count=2, size=16, seed=0)
    >>> views.images.shape, views.labels
    (torch.Size([2, 3, 16, 16]), ['circle', 'square'])
    """
    from PIL import Image, ImageDraw

    images, captions, labels = [], [], []
    scale = 4  # drawn large and reduced, for smooth edges
    for index in range(count):
        chance = random.Random(f"{seed}/{index}")
        shape, colour = SHAPES[index % len(SHAPES)], chance.choice(list(COLOURS))
        canvas = Image.new("RGB", (size * scale, size * scale), "white")
        radius = size * scale * chance.uniform(0.25, 0.42)
        free = size * scale - 2 * radius
        centre = (radius + free * chance.uniform(0.3, 0.7), radius + free * chance.uniform(0.3, 0.7))
        _draw(ImageDraw.Draw(canvas), shape, centre, radius, COLOURS[colour])
        pixels = numpy.array(canvas.resize((size, size), Image.Resampling.BOX))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        captions.append(f"a {colour} {shape}" if colour != "orange" else f"an {colour} {shape}")
        labels.append(shape)
    return TrainingViews(
        images=torch.stack(images),
        captions=captions,
        labels=list(labels),
        names=[f"shape-{index:05d}" for index in range(count)],
        splits=["heldout" if index % 20 == 19 else "train" for index in range(count)],
    )


def _draw(pen: ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        side = 0.85 * radius
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(1, round(0.35 * radius)))
    elif shape == "cross":
        arm = 0.32 * radius
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    else:
        pen.polygon(_corners(shape, x, y, radius), fill=colour)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    count, inner = (3, 1.0) if shape == "triangle" else (10, 0.42)
    corners = []
    for corner in range(count):
        angle = 2 * math.pi * corner / count - math.pi / 2
        reach = radius * (inner if corner % 2 and count == 10 else 1.0)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners
