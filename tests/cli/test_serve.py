"""`starflow serve` and `starflow app`: what is wrong with a command line, before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

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
