"""StarFlow: latent normalizing flows with exact likelihoods, from a prompt to a picture.

Names load when they are first used, so `starflow --help` answers before torch would be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from starflow.version import __version__

if TYPE_CHECKING:
    from starflow.flow.model import STARFlow, TarFlow
    from starflow.pipeline.pipeline import StarFlowPipeline
    from starflow.published.checkpoint import load_published
    from starflow.sampling.denoise import denoise
    from starflow.sampling.sampler import sample

__all__ = ["STARFlow", "StarFlowPipeline", "TarFlow", "__version__", "denoise", "load_published", "sample"]

_HOMES = {
    "STARFlow": "starflow.flow.model",
    "StarFlowPipeline": "starflow.pipeline.pipeline",
    "TarFlow": "starflow.flow.model",
    "denoise": "starflow.sampling.denoise",
    "load_published": "starflow.published.checkpoint",
    "sample": "starflow.sampling.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'starflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
