"""`starflow serve` and `starflow app`: what is wrong with a command line, before anything is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from starflow.cli import serve as module
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--port", "70000"), "--port is 70000"),
        (("serve", "--port", "-1"), "--port is -1"),
        (("serve", "--batch", "0"), "--batch is 0"),
        (("serve", "--queue", "0"), "--queue is 0"),
        (("serve", "--timeout", "0"), "--timeout is 0"),
        (("serve", "--drain", "nan"), "--drain is nan"),
        (("app", "--port", "x"), "--port is 'x'"),
    ],
)
def test_a_wrong_option_is_one_line(run: Run, arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert says in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(("command", "extra"), [("serve", "serve"), ("app", "app")])
def test_without_the_libraries_the_extra_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, extra: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(command)
    assert result.code == 2
    assert f"pip install 'starflow[{extra}]'" in result.err


@pytest.mark.parametrize("address", ["no.such.host.invalid", "1.2.3.4"])
def test_an_address_that_is_not_ours_is_one_line(run: Run, address: str) -> None:
    for library in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        pytest.importorskip(library)
    result = run("serve", "--host", address)
    assert result.code == 2
    assert f"cannot listen on {address}:8000" in result.err


def test_a_model_is_called_by_its_name_or_its_folder(tmp_path: object) -> None:
    assert module._name("glyphs") == "glyphs"
    assert module._name("owner/name") == "owner/name"
    assert module._name(str(tmp_path)) == str(tmp_path).rsplit("/", 1)[-1]


@pytest.mark.parametrize(
    ("locks", "roots"),
    [
        (("lock-app",), ("fastapi", "uvicorn", "python-multipart", "prometheus-client", "gradio")),
        (("lock-app", "lock-serve-tests"), ("openai", "playwright", "httpx")),
        (("lock-app", "lock-serve-tests"), ("ray[serve]",)),
    ],
)
def test_what_make_installs_without_dependencies_lacks_none(locks: tuple[str, ...], roots: tuple[str, ...]) -> None:
    """Every package that one of them needs is in a lock, as far as they are installed here."""
    folder = Path(__file__).parents[2] / "requirements"
    texts = [(folder / f"{name}.txt").read_text() for name in ("lock", *locks)]
    locked = {canonicalize_name(name) for text in texts for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    wanted, missing, seen = [Requirement(root) for root in roots], set[str](), set[tuple[str, str]]()
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        missing |= {name} - locked
        if (name, str(one.extras)) in seen:
            continue
        seen.add((name, str(one.extras)))
        try:
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        extras = [*one.extras, ""]
        wanted += [need for need in needs if not need.marker or any(need.marker.evaluate({"extra": e}) for e in extras)]
    assert not missing
