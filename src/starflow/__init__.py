"""StarFlow draws images from prompts by latent normalizing flows, and tells their exact likelihoods.

Names load when they are first used, so `starflow --help` answers before torch would be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starflow.flow.model import STARFlow, TarFlow
    from starflow.pipeline.pipeline import StarFlowPipeline
    from starflow.published.checkpoint import load_published
    from starflow.sampling.denoise import denoise
    from starflow.sampling.sampler import sample

__version__ = "0.1.0"
"""Packaging and `starflow --version` read it here."""

__all__ = ["STARFlow", "StarFlowPipeline", "TarFlow", "__version__", "denoise", "load_published", "sample"]

_MODULES = {
    "STARFlow": "starflow.flow.model",
    "StarFlowPipeline": "starflow.pipeline.pipeline",
    "TarFlow": "starflow.flow.model",
    "denoise": "starflow.sampling.denoise",
    "load_published": "starflow.published.checkpoint",
    "sample": "starflow.sampling.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'starflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
