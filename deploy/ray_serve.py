"""`starflow serve` as replicas of Ray Serve, which adds and removes them by the number of requests under way.

    pip install 'starflow[ray]'
    serve run deploy.ray_serve:build model=glyphs max_replicas=4

Each replica has its own model, scheduler and queue; the routes are those of `starflow serve`. A replica takes requests
when its model is there, and finishes what it has before it goes. A client whose replica is killed gets an error (a 500
or a closed connection) and asks again: as a seed makes a picture, it gets the same one.
"""

from __future__ import annotations

import os
from typing import Any

LOAD_SECONDS = 600.0
"""That a replica may take to load its model."""


def build(arguments: dict[str, str]) -> Any:
    """The application that `serve run` starts.

    Args:
        arguments: `model`, `device` (cpu), `gpus` and `cpus` of a replica (0 and 1), `min_replicas` (1),
            `max_replicas` (4), and `target`, the requests under way that a replica is to have (16).
    """
    from ray import serve

    known = {
        "model": "glyphs", "device": "cpu", "gpus": "0", "cpus": "1", "min_replicas": "1", "max_replicas": "4",
        "target": "16",
    }  # fmt: skip
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"unknown argument '{unknown[0]}', expected some of {', '.join(known)}")
    chosen = {**known, **arguments}
    model, device = chosen["model"], chosen["device"]

    @serve.deployment(
        autoscaling_config={
            "min_replicas": int(chosen["min_replicas"]),
            "max_replicas": int(chosen["max_replicas"]),
            "target_ongoing_requests": float(chosen["target"]),
        },
        max_ongoing_requests=256,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": float(chosen["cpus"]), "num_gpus": float(chosen["gpus"])},
    )
    @serve.ingress(lambda: _application(model, device))
    class Starflow:
        """One replica; what it answers is in its ASGI application."""

    deployment: Any = Starflow  # the decorators made it one
    return deployment.bind()


def _application(model: str, device: str) -> Any:
    """The ASGI application of a replica, its model loaded."""
    from starflow.pipeline.pipeline import StarFlowPipeline
    from starflow.serve.images_api import create_app
    from starflow.serve.service import Service

    service = Service(
        lambda: StarFlowPipeline.from_pretrained(model, device), model, api_key=os.environ.get("STARFLOW_API_KEY", "")
    )
    service.start()
    if not service.loaded.wait(LOAD_SECONDS):
        raise TimeoutError(f"the model was not loaded in {LOAD_SECONDS:g} s")
    if service.failure is not None:
        raise service.failure
    return create_app(service)
