"""Images to tokens and back, and the order in which a block reads them.

Shapes: B batch, C channels, H x W image or latent, p patch side, h = H/p and w = W/p, N = h*w tokens, D = C*p*p.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from starflow.errors import UserError

Grid = tuple[int, int]
"""The numbers of rows and columns of tokens, (h, w)."""


def grid_of(x: Tensor, channels: int, patch: int) -> Grid:
    """The token grid (h, w) of images or latents (B, C, H, W).

    Raises:
        UserError: another rank, other channels, or sides that are no multiples of the patch.

    >>> import torch
    >>> grid_of(torch.zeros(1, 4, 8, 16), channels=4, patch=2)
    (4, 8)
    """
    check_tensor("the input", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(f"the input has shape {tuple(x.shape)}, expected (batch, {channels}, height, width)")
    height, width = x.shape[2:]
    if height % patch or width % patch or not height or not width:
        raise UserError(f"the input is {height} x {width}, expected sides that are multiples of the patch, {patch}")
    return height // patch, width // patch


def check_tensor(name: str, x: Any) -> None:
    """Refuse what is no tensor of floats.

    Raises:
        UserError: an array, a list, a picture, None, or whole numbers such as the levels of uint8 pictures.

    >>> check_tensor("the input", [0.0])
    Traceback (most recent call last):
    starflow.errors.UserError: the input is a list, expected a tensor of floats: torch.as_tensor makes one
    """
    if not isinstance(x, Tensor):
        raise UserError(f"{name} is a {type(x).__name__}, expected a tensor of floats: torch.as_tensor makes one")
    if not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.")
        raise UserError(f"{name} is of {kind}, expected floats: pictures of 0..255 become x / 127.5 - 1")


def patchify(x: Tensor, patch: int, *, channel_first: bool = False) -> Tensor:
    """(B, C, H, W) to tokens (B, N, D) in raster order.

    D is ordered (row in patch, column in patch, channel), channel fastest; with `channel_first`, as in
    TarFlow, (channel, row, column), column fastest.

    >>> import torch
    >>> image = torch.arange(8).reshape(1, 2, 2, 2)
    >>> patchify(image, 2)
    tensor([[[0, 4, 1, 5, 2, 6, 3, 7]]])
    >>> patchify(image, 2, channel_first=True)
    tensor([[[0, 1, 2, 3, 4, 5, 6, 7]]])
    """
    batch, channels, height, width = x.shape
    cells = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    axes = (0, 2, 4, 1, 3, 5) if channel_first else (0, 2, 4, 3, 5, 1)
    tokens = (height // patch) * (width // patch)
    return cells.permute(axes).reshape(batch, tokens, channels * patch * patch)


def unpatchify(tokens_BND: Tensor, grid: Grid, patch: int, *, channel_first: bool = False) -> Tensor:
    """Tokens (B, N, D) in raster order to (B, C, H, W); the inverse of `patchify`."""
    (rows, columns), batch = grid, tokens_BND.shape[0]
    channels = tokens_BND.shape[2] // (patch * patch)
    inside = (channels, patch, patch) if channel_first else (patch, patch, channels)
    axes = (0, 3, 1, 4, 2, 5) if channel_first else (0, 5, 1, 3, 2, 4)
    cells = tokens_BND.reshape(batch, rows, columns, *inside).permute(axes)
    return cells.reshape(batch, channels, rows * patch, columns * patch)


def in_order(tokens: Tensor, *, backwards: bool) -> Tensor:
    """Tokens (B, N, D) from raster order to a block's own order, or back: the function is its own inverse."""
    return tokens.flip(1) if backwards else tokens
