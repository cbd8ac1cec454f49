"""Asking for large pages changes nothing that anyone can see but the speed."""

from __future__ import annotations

import torch

from starflow.nn.pages import LARGE, on_large_pages


def test_the_tensor_itself_comes_back_as_it_was() -> None:
    for count in (0, 3, LARGE // 4, LARGE):
        tensor = torch.arange(count, dtype=torch.float32)
        assert on_large_pages(tensor) is tensor
        assert torch.equal(tensor, torch.arange(count, dtype=torch.float32))
    elsewhere = torch.empty(LARGE, device="meta")
    assert on_large_pages(elsewhere) is elsewhere
