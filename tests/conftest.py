"""Fixtures for all tests: the device, the optional folder of shared data, and one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("starflow", deadline=None)
settings.load_profile("starflow")

SHARED = Path(os.environ.get("STARFLOW_SHARED", Path(__file__).parent.parent.parent / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the numerical tests run, e.g. cuda")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # inputs are tiny: a second thread costs more than it brings


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another device than a CPU only those run that compute there: the others would say what they say on a CPU."""
    if config.getoption("--device") != "cpu":
        there = [one for one in items if _takes_device(one) or one.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[one for one in items if one not in there])
        items[:] = there


def _takes_device(item: pytest.Item) -> bool:
    """Whether a test takes the fixture below, and no parameter of that name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "device" in getattr(item, "fixturenames", ()) and "device" not in parameters


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whether the compiled loop was built on this machine changes nothing here, unless STARFLOW_CACHE says where."""
    with pytest.MonkeyPatch.context() as patch:
        if "STARFLOW_CACHE" not in os.environ:
            patch.setenv("STARFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of shared data at {SHARED} (set STARFLOW_SHARED)")
    return SHARED
