"""The table of commands, and the one place where errors become exit codes.

0 is done, 2 is a user's mistake (one line on stderr), 130 is Ctrl-C; a bug keeps its traceback. A command's file is
imported when it is called, so that `starflow --help` needs neither torch nor the parser.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from starflow.errors import UserError
from starflow.version import __version__

MISTAKE = 2
INTERRUPTED = 130
FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the disk may answer anywhere, and no code of ours can help."""


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
        return len(self.name.split())


COMMANDS = (
    Command("generate", "generate", "generate", "make pictures from prompts or classes"),
    Command("likelihood", "likelihood", "likelihood", "exact log-likelihoods of pictures"),
    Command("evaluate", "evaluate", "evaluate", "measure a model on pictures: a table, JSON and a sheet"),
    Command("convert", "convert", "convert", "a published checkpoint into our layout"),
    Command("info", "info", "info", "what a model is made of"),
    Command("prepare-data", "prepare_data", "prepare_data", "build a set of captioned pictures: glyphs or glyphs2"),
    Command("train", "train", "train", "run a recipe: every missing stage, then the flow"),
    Command("train-autoencoder", "train", "train_autoencoder", "run a recipe's autoencoder stage alone"),
    Command("train-decoder", "train", "train_decoder", "fine-tune an autoencoder's decoder on noisy latents"),
    Command("cache-latents", "train", "cache_latents", "run a recipe's stages up to its latents"),
    Command("bench train", "bench", "bench_train", "time training against the machine's own matrix product"),
    Command("bench calibrate", "bench", "bench_calibrate", "measure how a model is best sampled here, once"),
    Command("bench sample", "bench", "bench_sample", "time sampling against the machine's limits and others"),
)

EXAMPLES = """\
examples:
  starflow generate "a red apple" --num-images 4 --output out
  starflow likelihood photo.png --prompt "a red apple"
  starflow train recipes/tiny.yaml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(words)
        except (UserError, OSError, KeyboardInterrupt) as error:
            return _answer(error)


def _answer(error: UserError | OSError | KeyboardInterrupt) -> int:
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
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"starflow {__version__}")
        return 0
    command = next((command for command in COMMANDS if words[: command.words] == command.name.split()), None)
    if command is None:
        return _group(words)
    from starflow.cli.options import parse

    run = _load(command)
    try:
        options = parse(typing.get_type_hints(run)["options"], command.name, words[command.words :])
    except SystemExit as stop:  # --help has printed
        return int(stop.code or 0)
    run(options)
    return 0


def _group(words: list[str]) -> int:
    """What is no command: the first word of some of two words, or a mistake."""
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
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
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
