"""The commands and programs of the README run as they stand, each section in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from starflow.cli.main import main
from starflow.pipeline.folder import BUNDLED

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = ("make test",)  # it is what runs this test


def blocks(section: str, language: str) -> list[str]:
    """Fenced blocks of a language under a heading."""
    parts = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
    return re.findall(rf"^```{language}\n(.*?)^```", parts[section], re.DOTALL | re.MULTILINE)


def commands(section: str) -> list[str]:
    return [line for block in blocks(section, "sh") for line in block.splitlines() if line and line not in NOT_RUN]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside the project's recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def glyphs() -> None:
    """The bundled model, or a skip."""
    if not all((ROOT / "src" / "starflow" / "bundled" / name / "config.json").is_file() for name in BUNDLED):
        pytest.skip("the bundled model is not in this tree")


def run(line: str) -> None:
    """One `starflow` command line, in this process."""
    name, *arguments = shlex.split(line)
    assert name == "starflow", line
    assert main(arguments) == 0, line


@pytest.mark.usefixtures("glyphs")
def test_make_generate(tmp_path: Path) -> None:
    line = commands("Two commands")[0]
    up_to_date = ["make", "--question", ".venv/.installed"]
    if subprocess.run(up_to_date, cwd=ROOT, capture_output=True, check=False).returncode != 0:
        pytest.skip("the tests run in another environment than make's")
    assert line.startswith("make generate ")
    subprocess.run([*shlex.split(line), f"ARGS=--output {tmp_path}"], cwd=ROOT, check=True, timeout=300)
    assert (tmp_path / "a-red-apple-0000.png").is_file()


@pytest.mark.usefixtures("glyphs")
def test_shell(empty: Path) -> None:
    for line in commands("Two commands")[1:]:
        run(line)
    assert len(list((empty / "out").glob("a-blue-car-*.png"))) == 4
    assert (empty / "out" / "grid.png").is_file()
    assert (empty / "car.png").is_file()


@pytest.mark.usefixtures("glyphs")
def test_python(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("Five lines of Python", "python")
    assert len([line for line in program.splitlines() if line]) == 5
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    assert (empty / "apple.png").is_file()
    assert 0 < float(capsys.readouterr().out) < 8


@pytest.mark.usefixtures("glyphs")
def test_install(empty: Path) -> None:
    """pip's lines are read: the extra and the package that they name exist, with the lock's version."""
    *pip, last = commands("Install")
    assert [line.split()[:2] for line in pip] == [["pip", "install"]] * 2
    (pinned,) = re.findall(r"[a-z0-9-]+==[0-9.]+", pip[1])
    assert pinned in (ROOT / "requirements" / "lock-data.txt").read_text()
    run(last)
    assert (empty / "out" / "a-red-apple-0000.png").is_file()


@pytest.mark.slow
def test_training(empty: Path) -> None:
    for line in commands("Train your own"):
        run(line)
    assert len(list((empty / "out").glob("*.png"))) == 9


def test_every_block_is_of_a_tested_section() -> None:
    """The command of the published weights is run by tests/pipeline/test_locate.py, against a local hub."""
    shells = ("Two commands", "Install", "Train your own", "The published weights")
    tested = {"sh": shells, "python": ("Five lines of Python",)}
    for language, sections in tested.items():
        found = re.findall(rf"^```{language}$", TEXT, re.MULTILINE)
        assert len(found) == sum(len(blocks(section, language)) for section in sections)


def test_it_is_short_and_says_what_was_never_checked() -> None:
    assert len(TEXT.splitlines()) < 110
    assert "never checked against the live hub" in " ".join(TEXT.split())


def test_commands_that_are_only_named_exist() -> None:
    from starflow.cli.main import COMMANDS

    known = {command.name for command in COMMANDS} | {"COMMAND"}
    assert {words.split()[0] for words in re.findall(r"`starflow (\S[^`]*)`", TEXT)} <= known


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    absent = [link for link in links if not (ROOT / link).exists()]
    bundled = ROOT / "src" / "starflow" / "bundled" / "glyphs" / "config.json"
    waiting = [link for link in absent if "glyphs" in link and not bundled.exists()]
    assert absent == waiting
