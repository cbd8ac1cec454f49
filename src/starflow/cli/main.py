"""The table of commands is read here, and errors become exit codes.

Code 0 is done, 2 is a user's mistake (one line on stderr), 130 is Ctrl-C or SIGTERM, 141 a closed pipe; a bug keeps
its traceback.
The file of a command is imported when it is called, so that `starflow --help` needs neither torch nor the parser.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from starflow import __version__
from starflow.errors import UserError

MISTAKE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
"""Exit codes of a user's mistake, of Ctrl-C or SIGTERM, and of a reader of our output that is gone."""

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the system that no code of ours can help, wherever they come from."""


@dataclass(frozen=True)
class Command:
    """One row of the table; `function` lies in `starflow.cli.<module>` and takes the command's options.

    A name may have two words, as in "bench sample".
    """

    name: str
    module: str
    function: str
    summary: str

    @property
    def words(self) -> int:
        """The number of words in its name."""
        return len(self.name.split())


COMMANDS = (
    Command("generate", "generate", "generate", "make pictures from prompts or classes"),
    Command("inpaint", "edit", "inpaint", "paint a part of a picture anew"),
    Command("edit", "edit", "edit", "change a picture by its prompt; variations, interpolation"),
    Command("app", "serve", "app", "a web page that draws, edits and judges pictures"),
    Command("serve", "serve", "serve", "pictures over HTTP, as OpenAI's Images API"),
    Command("likelihood", "likelihood", "likelihood", "exact log-likelihoods of pictures"),
    Command("evaluate", "evaluate", "evaluate", "measure a model on pictures: a table, JSON and a sheet"),
    Command("convert", "convert", "convert", "a published checkpoint into our layout"),
    Command("info", "info", "info", "what a model is made of"),
    Command("prepare-data", "prepare_data", "prepare_data", "build a set of captioned pictures: glyphs or glyphs2"),
    Command("train", "train", "train", "run a recipe: every missing stage, then the flow"),
    Command("train-autoencoder", "train", "train_autoencoder", "run a recipe's autoencoder stage alone"),
    Command("train-decoder", "train", "train_decoder", "fine-tune an autoencoder's decoder on noisy latents"),
    Command("train-student", "train", "train_student", "train what draws in one pass, an approximation of a flow"),
    Command("train-denoiser", "train", "train_denoiser", "train what takes the noise off samples in one pass"),
    Command("cache-latents", "train", "cache_latents", "run a recipe's stages up to its latents"),
    Command("bench train", "bench", "bench_train", "time training against the machine's own matrix product"),
    Command("bench calibrate", "bench", "bench_calibrate", "measure how a model is best sampled here, once"),
    Command("bench sample", "bench", "bench_sample", "time sampling against the machine's limits and others"),
)

EXAMPLES = """\
examples:
  starflow generate "a red apple" --num-images 4 --output out
  starflow inpaint photo.png --mask mask.png --prompt "a red apple"
  starflow likelihood photo.png --prompt "a red apple"
  starflow train recipes/tiny.yaml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us (`>&-`)
            setattr(sys, name, _nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of what a console cannot show, its code is shown
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with _terminations():
                code = _dispatch([_checked_text(word) for word in words])
            sys.stdout.flush()  # a closed pipe is noticed here rather than at the interpreter's end
            return code
        except BrokenPipeError:
            return _leave_closed_pipe()
        except (UserError, OSError, KeyboardInterrupt) as error:
            return _exit_code(error)


@contextlib.contextmanager
def _terminations() -> Iterator[None]:
    """A context in which SIGTERM unwinds as Ctrl-C does, so that worker processes and half-written files go with it."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    previous: Any = None
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _checked_text(word: str) -> str:
    """A word of the command line, unless it is neither text nor the name of a file that is there.

    Raises:
        UserError: bytes that the console's encoding does not have.
    """
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        if not Path(word).exists():
            shown = word.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"'{shown}' is no UTF-8 text: write it in UTF-8, or set the console to it") from None
    return word


def _leave_closed_pipe() -> int:
    """Whoever read our output is gone (`starflow info | head -1`): end without a word, as the signal would."""
    sys.stdout = _nowhere()  # for the flush at the interpreter's end
    return CLOSED_PIPE


def _nowhere() -> TextIO:
    """A stream whose text goes nowhere."""
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def _exit_code(error: UserError | OSError | KeyboardInterrupt) -> int:
    """Print an expected error as one line and return its exit code; others go on."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\nstarflow: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno not in FULL_OR_FORBIDDEN:
        raise error
    text = f"{error.filename or 'cannot write'}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"starflow: {' '.join(text.split())}", file=sys.stderr)
    return MISTAKE


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else ""
    if name == "help" and words[1:]:
        return _dispatch([*words[1:], "--help"])
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"starflow {__version__}")
        return 0
    command = next((command for command in COMMANDS if words[: command.words] == command.name.split()), None)
    if command is None:
        return _answer_no_command(words)
    from starflow.cli.options import parse

    run = _load(command)
    try:
        options = parse(typing.get_type_hints(run)["options"], command.name, words[command.words :])
    except SystemExit as stop:  # --help has printed
        return int(stop.code or 0)
    run(options)
    return 0


def _answer_no_command(words: list[str]) -> int:
    """Answer words that are no command: help on commands of two words, or an error."""
    rows = [command for command in COMMANDS if command.words > 1 and command.name.split()[:1] == words[:1]]
    if rows and words[1:2] in (["-h"], ["--help"]):
        print("\n".join([f"usage: starflow {words[0]} COMMAND ...", "", "commands:", *_rows(rows)]))
        return 0
    if rows:
        known = ", ".join(command.name.split()[1] for command in rows)
        raise UserError(f"'{' '.join(words[:2])}' is no command, expected {words[0]} and one of {known}")
    raise UserError(_unknown(words[0] if words else ""))


def _rows(commands: Sequence[Command]) -> list[str]:
    width = max(len(command.name) for command in COMMANDS)
    return [f"  {command.name:{width}}  {command.summary}" for command in commands]


def _load(command: Command) -> Callable[[Any], None]:
    function: Callable[[Any], None] = getattr(
        importlib.import_module(f"starflow.cli.{command.module}"), command.function
    )
    return function


def _unknown(name: str) -> str:
    known = [command.name for command in COMMANDS]
    if not name:
        return f"no command given, expected one of {', '.join(known)}; see starflow --help"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"unknown command '{name}': " + (f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}")


def _help() -> str:
    return "\n".join(
        [
            "usage: starflow COMMAND ... [--help] [--version]",
            "",
            "Latent normalizing flows for pictures: sample from a prompt, train, and read exact likelihoods.",
            "",
            "commands:",
            *_rows(COMMANDS),
            "",
            EXAMPLES,
            "",
            "starflow COMMAND --help says more.",
        ]
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the place in the code that it comes from."""
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
