"""Typed options: a frozen dataclass a command, and its command line.

Contract: every field is annotated with a `Flag`, or an `Argument` where it is positional, which says what it is for;
`num_images` is `--num-images`, and a tuple is a flag that may be repeated, or an argument that takes several. The
class's docstring is the command's description, its `EXAMPLES` end the help. Whatever is wrong with a command line is a
UserError of one line, without the usage.

Where pictures go: a folder, or one file.

Values that several commands read: sizes, aspect ratios, devices, precisions.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from starflow.errors import UserError
from starflow.io import files

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser


OVERRIDES = "overrides"
"""The field, where a class has it, that takes options of other names: (("train.lr", "1e-4"), ...)."""


class Options(Protocol):
    """What `parse` builds."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    EXAMPLES: ClassVar[str]


T = TypeVar("T", bound=Options)


@dataclass(frozen=True)
class Flag:
    """An option; its help, what stands for its value there, and its name where that is not the field's."""

    help: str
    metavar: str = ""
    name: str = ""


@dataclass(frozen=True)
class Argument:
    """A positional argument."""

    help: str
    metavar: str = ""


@dataclass(frozen=True)
class Parameter:
    """One field of an options class, as the parser needs it."""

    field: str
    kind: Any
    """The type of one value."""
    several: bool
    default: Any
    note: Flag | Argument

    @property
    def shown(self) -> str:
        """Its name on the command line."""
        if isinstance(self.note, Argument):
            return self.note.metavar or self.field.upper()
        return "--" + (self.note.name or self.field.replace("_", "-"))

    @property
    def help(self) -> str:
        worth_saying = self.kind is not bool and self.default not in ("", None, (), dataclasses.MISSING)
        return (self.note.help + (f" (default: {self.default})" if worth_saying else "")).replace("%", "%%")


def parameters(cls: type[Options]) -> list[Parameter]:
    """The fields of an options class that the command line gives one by one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [_parameter(field, hints[field.name]) for field in dataclasses.fields(cls) if field.name != OVERRIDES]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    kind, note = typing.get_args(hint)
    assert isinstance(note, (Flag, Argument)), f"{field.name} says nothing of itself"
    several = typing.get_origin(kind) is tuple
    return Parameter(field.name, typing.get_args(kind)[0] if several else kind, several, field.default, note)


def parse(cls: type[T], command: str, words: Sequence[str]) -> T:
    """The options that a command line gives. `--help` prints and exits with code 0.

    Raises:
        UserError: an unknown option, a missing or wrong value.
    """
    from jsonargparse import ArgumentError

    known = parameters(cls)
    overridable = OVERRIDES in cls.__dataclass_fields__
    flags = [one.shown for one in known if isinstance(one.note, Flag)]
    rest, overrides = split_overrides(words, flags) if overridable else (list(words), [])
    try:
        values = vars(_parser(cls, known, command).parse_args(rest))
    except ArgumentError as error:
        raise UserError(_explain(str(error), known, command)) from None
    given = {one.field: tuple(values[one.field] or ()) if one.several else values[one.field] for one in known}
    if overridable:
        given[OVERRIDES] = tuple(overrides)
    return cls(**given)


def split_overrides(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Set `--a.b value` and `--a.b=value` apart from the known flags.

    Raises:
        UserError: no value, or a name that is nearly a known flag.
    """
    rest: list[str] = []
    overrides = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in ("--", "--help") or name in known:
            rest.append(argument)
            continue
        if "." not in name and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.75)):
            raise UserError(f"unknown option '{name}': did you mean '{near[0]}'?")
        value = value if equals else next(waiting, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"'{name}' has no value: write {name} VALUE")
        overrides.append((name.removeprefix("--"), value))
    return rest, overrides


def _parser(cls: type[Options], known: Sequence[Parameter], command: str) -> ArgumentParser:
    import argparse

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"starflow {command}",
        description=_dedent(cls.__doc__ or ""),
        epilog="examples:\n" + textwrap.indent(_dedent(cls.EXAMPLES), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for one in known:
        _add(parser, one)
    return parser


def _dedent(text: str) -> str:
    """A docstring's text, whose first line may stand beside the quotes."""
    first, newline, rest = text.strip().partition("\n")
    return first + newline + textwrap.dedent(rest)


def _add(parser: ArgumentParser, one: Parameter) -> None:
    required = one.default is dataclasses.MISSING
    shown: dict[str, Any] = {"help": one.help, **({"metavar": one.note.metavar} if one.note.metavar else {})}
    if one.kind is bool:
        parser.add_argument(one.shown, dest=one.field, action="store_true", **shown)
        return
    if isinstance(one.note, Argument):
        count = "+" if one.several else None
        optional = {} if required else {"default": one.default, "nargs": "*" if one.several else "?"}
        parser.add_argument(one.field, **{"type": one.kind, "nargs": count, **optional, **shown})
        return
    if one.several:
        parser.add_argument(one.shown, dest=one.field, type=_each(one.kind), action="append", **shown)
        return
    parser.add_argument(one.shown, dest=one.field, type=one.kind, required=required, default=one.default, **shown)


def _each(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`kind` of a value, or of every value of a list: jsonargparse checks a repeated flag again as a whole."""

    def convert(value: Any) -> Any:
        return [kind(one) for one in value] if isinstance(value, list) else kind(value)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


def _explain(text: str, known: Sequence[Parameter], command: str) -> str:
    """An error of the parser in one line: received, expected, remedy."""
    if wrong := re.match(r'Parser key "(\w+)":.*value: (.*)', text, re.DOTALL):
        one = next(one for one in known if one.field == wrong[1])
        return f"{one.shown} is '{wrong[2].strip()}', expected {describe(one.kind)}"
    if unknown := re.match(r"unrecognized arguments: (\S+)", text):
        if not unknown[1].startswith("-"):
            return f"unexpected argument '{unknown[1]}': put a text of several words in quotes"
        near = difflib.get_close_matches(unknown[1], [one.shown for one in known], n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"see starflow {command} --help"
        return f"unknown option '{unknown[1]}': {hint}"
    return f"{' '.join(text.split())}; see starflow {command} --help"


def describe(hint: Any) -> str:
    """What a flag takes, in words."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, choices))}"
    words = {int: "a whole number", float: "a number", str: "a text"}
    named = [describe(part) for part in choices if part is not type(None)]
    return " or ".join(named) or words.get(hint, str(hint))


OTHER_FORMATS = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

LONGEST_NAME = 60


@dataclass(frozen=True)
class OutputTarget:
    """A folder for PNG files that can be written, or the one file of it that is to be written."""

    folder: Path
    file: Path | None = None

    @classmethod
    def of(cls, output: str, count: int, *, grid: bool = False) -> OutputTarget:
        """Read `--output` for `count` pictures, and prove that it can be written.

        Raises:
            UserError: several pictures for one file, another format, a file where the folder should be, no permission.
        """
        path = Path(output).expanduser()
        suffix = path.suffix.lower()
        if suffix in OTHER_FORMATS:
            raise UserError(f"--output is {output}, but pictures are written as PNG: name a folder or a .png file")
        if suffix != ".png":
            return cls(files.check_output_folder(path))
        if count > 1 or grid:
            what = "a grid as well" if count == 1 else f"{count} pictures"
            raise UserError(f"--output is the one file {output}, but {what} is asked for: name a folder")
        if path.is_dir():
            raise UserError(f"--output {output} is a folder, expected a file of that ending: choose another --output")
        return cls(files.check_output_folder(path.parent), path)

    def path(self, prompt: str, seed: int) -> Path:
        """The file of one picture; seeds differ within a call, so names do."""
        return self.file or self.folder / f"{slug(prompt) or 'unconditional'}-{seed:04d}.png"

    @property
    def grid_path(self) -> Path:
        """The file of all pictures side by side."""
        return self.folder / "grid.png"


def slug(text: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, in lower case, other runs as one hyphen."""
    from starflow.conditioning.text import name_emoji

    words = re.findall(r"\w+", name_emoji(text).casefold().replace("_", " "))
    return "-".join(words)[:LONGEST_NAME].rstrip("-")


Device = Literal["auto", "cpu", "cuda", "mps"]

Precision = Literal["float32", "bfloat16"]

CacheDtype = Literal["network", "bfloat16"]

LARGEST_SEED = 2**63 - 1


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "64x48", in pixels.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    if not found:
        raise UserError(f"--size is '{text}', expected WIDTHxHEIGHT in pixels, e.g. 64x64")
    return int(found[1]), int(found[2])


def check_seed(seed: int) -> None:
    """Raises UserError: a seed that no generator takes."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed is {seed}, expected 0 to {LARGEST_SEED}")


def pick_device(name: Device) -> torch.device:
    """The device of that name; "auto" is the first there is of cuda, mps and cpu.

    Raises:
        UserError: this machine, or this torch, has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, usable in there.items() if usable))
    if not there[name]:
        usable = ", ".join(device for device, found in there.items() if found)
        raise UserError(f"--device is {name}, but torch {torch.__version__} finds none here: it can use {usable}")
    return torch.device(name)


def pick_dtype(name: Precision) -> torch.dtype:
    """The precision of that name."""
    import torch

    return torch.bfloat16 if name == "bfloat16" else torch.float32
