"""Heat maps: the scale's ends and middle, cells without smoothing, and what the file says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.errors import UserError
from starflow.evaluate.heatmap import colour, heatmap, save_heatmap


def test_low_is_blue_and_high_is_red() -> None:
    made = colour(torch.tensor([[0.0, 1.0, 2.0, 9.0, torch.nan]]), 0.0, 2.0)[:, 0].T
    low, middle, high, beyond, missing = made
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert middle.min() > 0.9
    assert torch.equal(high, beyond)
    assert torch.equal(missing, torch.full((3,), -1.0))


def test_cells_keep_their_edges(tmp_path: Path) -> None:
    save_heatmap(tmp_path / "m.png", torch.tensor([[0.0, 1.0]]), (8, 4), 0.0, 1.0, "bits/dim")
    with Image.open(tmp_path / "m.png") as made:
        assert made.size == (8, 4)
        assert len(made.getcolors() or []) == 2
        assert made.getpixel((3, 0)) != made.getpixel((4, 0))
        assert made.text == {"low": "0 bits/dim", "high": "1 bits/dim"}  # type: ignore[attr-defined]


def test_equal_values_and_no_plane() -> None:
    assert heatmap(torch.ones(2, 2), (4, 4), 1.0, 1.0).size == (4, 4)
    with pytest.raises(UserError, match=r"\(3,\)"):
        heatmap(torch.ones(3), (4, 4), 0.0, 1.0)
