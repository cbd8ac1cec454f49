"""Where the compiled loop comes from: built once and only when it pays, refused where it cannot be trusted."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import pickle
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow.flow.model import Flow
from starflow.sampling.cpu import build
from starflow.sampling.cpu.build import BuildCommand, BuildError, Library
from starflow.sampling.cpu.engine import WORTH_BUILDING, CpuEngine
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import run
from tests.compilers import set_compiler
from tests.sampling.cpu.common import assert_close, engine_for
from tests.sampling.cpu.test_engine import text_case

ROOT = Path(__file__).parents[3]


def sampled(model: Flow | None = None, engine: CpuEngine | None = None) -> Tensor:
    case = text_case()
    model = model or case.model
    if engine is not None:
        model.runtime_cache["engine"] = engine
    return run(model, case.x, case.condition, case.null_condition, SampleSettings(1.0)).x


def compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set CXX to a shell script of ours."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    set_compiler(str(path), monkeypatch)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, r"no C\+\+ compiler \(/nowhere/c\+\+\): install one, or set CXX"),
        ("echo broken: no such header >&2; exit 1", "compiler failed: broken: no such header"),
        ("exit 0", "compiler failed: it gave no reason"),
        ('while [ "$1" != -o ]; do shift; done 2>/dev/null; echo nonsense > "$2"', "does not load"),
    ],
    ids=["none", "fails", "makes nothing", "makes nonsense"],
)
def test_without_a_working_compiler_it_samples_eagerly_with_one_note(
    script: str | None, reason: str, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = sampled(engine=engine_for(None))
    set_compiler("/nowhere/c++", monkeypatch)
    if script is not None:
        compiler(tmp_path, f'[ "$1" = --version ] && exit 0\n{script}', monkeypatch)
    case = text_case()
    case.model.runtime_cache["engine"] = CpuEngine(2 * WORTH_BUILDING)
    with pytest.warns(UserWarning, match=f"without its compiled loop, several times slower: .*{reason}") as notes:
        first = sampled(case.model)
    assert len(notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampled(case.model), first)
        assert torch.equal(sampled(copy.deepcopy(case.model)), first)
    assert torch.equal(first, eager)


def test_a_small_model_says_that_there_is_no_compiler_too(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_compiler("/nowhere/c++", monkeypatch)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        sampled()


def test_a_model_of_a_moment_is_not_worth_a_build(empty_cache: Path, recipe: BuildCommand) -> None:
    model = text_case().model
    sampled(model, CpuEngine(0.5 * WORTH_BUILDING))
    assert list(empty_cache.iterdir()) == []
    engine = model.runtime_cache["engine"]
    assert isinstance(engine, CpuEngine)
    assert engine.library is None


def test_a_model_stays_with_what_its_first_picture_was_drawn_by(full_cache: BuildCommand) -> None:
    """A library that another model or process builds meanwhile changes none of its pictures."""
    away = full_cache.path.rename(full_cache.path.with_suffix(".away"))
    model, engine = text_case().model, CpuEngine(0.0)
    first = sampled(model, engine)
    away.rename(full_cache.path)
    assert torch.equal(sampled(model), first)
    assert engine.library is None
    engine.build()
    assert engine.library is not None, "an explicit wish is heard"


def test_what_was_built_before_is_used_at_once(full_cache: BuildCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_again(_self: BuildCommand) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(BuildCommand, "_compile", compile_again)
    engine = CpuEngine(0.0)
    sampled(engine=engine)
    assert engine.library is not None


def test_any_other_is_built_for_at_once(
    empty_cache: Path, library: Library, recipe: BuildCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuildCommand, "_compile", lambda self: shutil.copy(recipe.path, self.path))
    engine = CpuEngine(2 * WORTH_BUILDING)
    sampled(engine=engine)
    assert engine.library is not None
    assert [path.name for path in empty_cache.iterdir()] == [recipe.path.name]


def test_the_module_builds_before_the_first_picture_or_says_why_not(
    empty_cache: Path, recipe: BuildCommand, library: Library, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(BuildCommand, "_compile", lambda self: shutil.copy(recipe.path, self.path))
    build.main()
    assert capsys.readouterr().out == f"compiled token loop: {empty_cache / recipe.path.name}\n"
    assert (empty_cache / recipe.path.name).is_file()
    set_compiler("/nowhere/c++", monkeypatch)
    build.main()
    assert "no compiled token loop, so sampling will be slower: no C++ compiler" in capsys.readouterr().out
    assert "python -m starflow.sampling.cpu.build" in (ROOT / "Makefile").read_text()


def test_a_damaged_library_is_built_anew(
    full_cache: BuildCommand, recipe: BuildCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_cache.path.write_bytes(b"damaged")
    monkeypatch.setattr(BuildCommand, "_compile", lambda self: shutil.copy(recipe.path, self.path))
    assert full_cache.build().panels.panel > 0


def test_a_compiler_that_does_not_know_this_processor_goes_without(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$*" in *=native*) echo unknown processor >&2; exit 1;; esac\n'
    compiler(tmp_path, f'{script}while [ "$1" != -o ]; do shift; done 2>/dev/null; echo made > "$2"', monkeypatch)
    recipe = BuildCommand.here()
    recipe._compile()
    assert recipe.path.read_text() == "made\n"
    assert [path.name for path in empty_cache.iterdir()] == [recipe.path.name], "what lay beside it is gone"


def test_the_name_holds_the_source_the_flags_and_the_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path) -> None:  # fmt: skip
    names = set()
    for version in ("one", "two"):
        compiler(tmp_path, f"echo {version}", monkeypatch)
        names.add(BuildCommand.here().path.name)
    monkeypatch.setattr(build, "cpu_lines", lambda *_fields: ["another processor"])
    names.add(BuildCommand.here().path.name)
    other = tmp_path / "step.cpp"
    other.write_text("// another source\n")
    monkeypatch.setattr(build, "SOURCE", other)
    names.add(BuildCommand.here().path.name)
    set_compiler(f"{tmp_path / 'compiler'} -g", monkeypatch)
    names.add(BuildCommand.here().path.name)
    assert len(names) == 5


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_refused(
    empty_cache: Path, recipe: BuildCommand, library: Library, mode: int
) -> None:
    """Even with a library in it: anyone could have put it there."""
    empty_cache.mkdir()
    shutil.copy(recipe.path, empty_cache)
    empty_cache.chmod(mode)
    with pytest.raises(BuildError, match="may be written to by others: set STARFLOW_CACHE to a folder of your own"):
        BuildCommand.here()
    with pytest.warns(UserWarning, match="may be written to by others"):
        sampled()


def test_a_folder_that_cannot_be_made_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="cannot be made"):
        build.cache_folder()


def test_the_folder_is_made_for_the_user_alone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.cache_folder() == empty_cache
    assert empty_cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("STARFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    assert build.cache_folder() == empty_cache / "starflow"


def test_a_model_that_has_sampled_is_saved_copied_and_sent_as_any_other(library: Library, tmp_path: Path) -> None:
    case = text_case()
    case.model.save_pretrained(tmp_path / "before")
    x = sampled(case.model, engine_for(library))
    case.model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        engine = other.runtime_cache["engine"]
        assert isinstance(engine, CpuEngine)
        assert engine is not case.model.runtime_cache["engine"]
        assert engine.bytes == 0
        engine.library = library
        assert torch.equal(sampled(other), x)


def test_it_is_part_of_what_is_installed() -> None:
    wheels = pytest.importorskip("hatchling.builders.wheel")
    sdists = pytest.importorskip("hatchling.builders.sdist")
    for builder in (wheels.WheelBuilder(str(ROOT)), sdists.SdistBuilder(str(ROOT))):
        names = {Path(file.path).relative_to(ROOT).as_posix() for file in builder.recurse_included_files()}
        assert "src/starflow/sampling/cpu/step.cpp" in names


@pytest.mark.slow
@pytest.mark.parametrize("target", ["-march=x86-64", "-march=x86-64-v3", "-O1"])
def test_other_processors_compute_the_same(recipe: BuildCommand, library: Library, tmp_path: Path, target: str) -> None:
    """Vectors of 4 and 8 numbers instead of 16, and what compilers make of them."""
    other = dataclasses.replace(recipe, target=target, path=tmp_path / "other.so")
    other._compile()
    made = Library(build._declare_functions(ctypes.CDLL(str(other.path))))
    assert_close(sampled(engine=engine_for(made)), sampled(engine=engine_for(library)))


def test_the_source_compiles_without_a_warning(recipe: BuildCommand) -> None:
    command = [*recipe.command, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(build.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
