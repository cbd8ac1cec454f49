"""Another C++ compiler than the machine's own, for a test."""

from __future__ import annotations

import pytest


def set_compiler(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set CXX for the rest of a test.

    torch.compile reads CXX too, once, when its settings are first imported: that must not happen here, or every later
    compilation in this process fails.
    """
    import torch._inductor.config  # noqa: F401

    monkeypatch.setenv("CXX", command)
