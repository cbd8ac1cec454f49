"""The table of commands, help, and errors as exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import pytest

from starflow import __version__
from starflow.cli import main as table
from starflow.cli.info import InfoOptions
from starflow.errors import UserError
from tests.cli.conftest import Result, Run, fails

NAMES = [command.name for command in table.COMMANDS]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_command_and_ends_with_examples(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in NAMES)
    assert "examples:\n  starflow generate" in result.out


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_command_shows_examples_of_it(run: Run, name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.code == 0
    assert f"examples:\n  starflow {name}" in result.out
    assert result.err == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["torch", "transformers", "diffusers", "numpy", "PIL", "huggingface_hub"]
    code = (
        f"import sys\nfrom starflow.cli.main import main\nassert main({arguments}) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_help_answers_in_half_a_second() -> None:
    """Wall time on an idle core; the best of five, as a busy machine only adds to it."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        python("-m", "starflow", "--help")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_version(run: Run) -> None:
    assert run("--version").out == f"starflow {__version__}\n"


def test_the_module_is_the_command() -> None:
    done = python("-m", "starflow", "generat")
    assert done.returncode == 2
    assert done.stderr == "starflow: unknown command 'generat': did you mean 'generate'?\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no command given", "generate"]),
        (["zzz"], ["unknown command 'zzz'", "known are generate"]),
        (["generate", "--sed", "1"], ["unknown option '--sed'", "'--seed'"]),
        (["generate", "--zzz", "1"], ["unknown option '--zzz'", "starflow generate --help"]),
        (["generate", "--num", "1"], ["unknown option '--num'"]),
        (["generate", "a cat", "--int8"], ["--int8 is now --weights int8: write that instead"]),
        (["generate", "a cat", "--weights", "int3"], ["--weights is 'int3'", "int8, int4"]),
        (["generate", "a", "b"], ["unexpected argument 'b'", "in quotes"]),
        (["generate", "--seed", "x"], ["--seed is 'x'", "a whole number"]),
        (["generate", "--guidance", "much"], ["--guidance is 'much'", "a number"]),
        (["generate", "--solver", "fast"], ["--solver is 'fast'", "auto, sequential, jacobi"]),
        (["generate", "--aspect", "7:3"], ["--aspect is '7:3'", "21:9, 16:9"]),
        (["generate", "--seed"], ["--seed", "expected one argument"]),
        (["likelihood"], ["required", "IMAGE"]),
        (["train"], ["required", "RECIPE"]),
        (["prepare-data", "cats"], ["DATA is 'cats'", "one of glyphs"]),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments: list[str], parts: list[str]) -> None:
    fails(run(*arguments), *parts)


Fail = Callable[[BaseException], Result]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, run: Run) -> Fail:
    """Run a command that warns and then raises."""

    def call(error: BaseException) -> Result:
        def stop(options: InfoOptions) -> NoReturn:
            warnings.warn("look\n  here")
            raise error

        monkeypatch.setattr(table, "_load", lambda command: stop)
        return run("info")

    return call


def test_a_users_mistake_is_one_line_and_code_2(fail: Fail) -> None:
    result = fail(UserError("a\n  b"))
    assert (result.code, result.err) == (2, "warning: look here\nstarflow: a b\n")


def test_ctrl_c_is_code_130(fail: Fail) -> None:
    result = fail(KeyboardInterrupt())
    assert (result.code, result.err.splitlines()[-1]) == (130, "starflow: interrupted")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_sigterm_unwinds_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    def wait(options: InfoOptions) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(table, "_load", lambda command: wait)
    result = run("info")
    assert (result.code, result.err.splitlines()[-1], cleaned) == (130, "starflow: stopped by SIGTERM", [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_one_line_and_code_2(fail: Fail) -> None:
    result = fail(OSError(errno.ENOSPC, "No space left on device", "log.jsonl"))
    assert (result.code, result.err.splitlines()[-1]) == (2, "starflow: log.jsonl: No space left on device")


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.EIO, "broken")])
def test_a_bug_keeps_its_traceback(fail: Fail, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


def test_warnings_are_shown_as_before_once_the_command_is_done(run: Run) -> None:
    before = warnings.showwarning
    run("--version")
    assert warnings.showwarning is before


def starflow(words: list[str | bytes], *python: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *python, "-m", "starflow", *words]
    return subprocess.run(command, capture_output=True, env=os.environ | env, timeout=120, check=False)


def test_a_closed_pipe_is_no_error() -> None:
    """`starflow --help | head -0`: whoever reads is gone before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "starflow", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("closed", "words", "code"), [(">&-", "--version", 0), ("2>&-", "nonsense", 2)])
def test_a_stream_that_is_closed_is_no_error(closed: str, words: str, code: int) -> None:
    line = f"'{sys.executable}' -m starflow {words} {closed}"
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_another_encoding_gets_the_codes_of_what_it_cannot_show(encoding: str) -> None:
    done = starflow(["\u4e2d\u6587"], PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.startswith(b"starflow: unknown command '\\u4e2d\\u6587'")


def test_a_prompt_that_is_no_utf8_is_one_line() -> None:
    done = starflow([b"generate", b"a caf\xe9"])
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"is no UTF-8 text" in done.stderr


def test_help_without_docstrings() -> None:
    done = starflow(["generate", "--help"], "-OO")
    assert done.returncode == 0
    assert b"--guidance" in done.stdout


def test_short_forms_and_the_word_help(run: Run) -> None:
    assert run("-V").out == run("--version").out
    assert run("help").out == run("--help").out
    assert run("help", "generate").out == run("generate", "--help").out
    assert run("help", "bench", "train").out == run("bench", "train", "--help").out


@pytest.mark.parametrize("name", ["finetune", "sample", "x"])
def test_a_command_that_is_like_no_other_is_suggested_none(run: Run, name: str) -> None:
    assert "did you mean" not in run(name).err


@pytest.mark.parametrize(("typed", "meant"), [("generat", "generate"), ("trian", "train"), ("evalute", "evaluate")])
def test_a_slip_is_suggested_its_command(run: Run, typed: str, meant: str) -> None:
    fails(run(typed), f"did you mean '{meant}'?")
