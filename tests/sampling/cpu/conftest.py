"""One build of step.cpp for all tests of the engine, in a folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from starflow.sampling.cpu.build import BuildCommand, BuildError, Library


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> BuildCommand:
    """How it is built here; the test is skipped where there is no compiler."""
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARFLOW_CACHE", str(folder))
        try:
            return BuildCommand.here()
        except BuildError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def library(recipe: BuildCommand) -> Library:
    return recipe.build()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was built yet."""
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def full_cache(recipe: BuildCommand, library: Library, empty_cache: Path) -> BuildCommand:
    """A machine on which it was built before."""
    empty_cache.mkdir(mode=0o700)
    return dataclasses.replace(recipe, path=Path(shutil.copy(recipe.path, empty_cache)))
