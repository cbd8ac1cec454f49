"""StarFlow: latent normalizing flows with exact likelihoods, from a prompt to a picture.

Names load when they are first used, so `starflow --help` answers before torch would be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from starflow.version import __version__

if TYPE_CHECKING:
    from starflow.flow.model import STARFlow, TarFlow
    from starflow.pipeline import StarFlowPipeline
    from starflow.sampling.denoise import denoise
    from starflow.sampling.sampler import sample
    from starflow.weights.published import load_published

__all__ = ["STARFlow", "StarFlowPipeline", "TarFlow", "__version__", "denoise", "load_published", "sample"]

_HOMES = {
    "STARFlow": "starflow.flow.model",
    "StarFlowPipeline": "starflow.pipeline",
    "TarFlow": "starflow.flow.model",
    "denoise": "starflow.sampling.denoise",
    "load_published": "starflow.weights.published",
    "sample": "starflow.sampling.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'starflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
