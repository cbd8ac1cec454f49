"""A command's options are a frozen dataclass, which gives its command line, its help and its errors.

Contract: every field is annotated with a `Flag`, or an `Argument` where it is positional, which says what it is for;
`num_images` is `--num-images`, and a tuple is a flag that may be repeated, or an argument that takes several. The
class's docstring is the command's description, its `EXAMPLES` end the help. Whatever is wrong with a command line is a
UserError of one line, without the usage.

Values that several commands read follow below: where pictures are written, sizes, seeds, devices and precisions.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import gc
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

from starflow.errors import UserError
from starflow.io import files

if TYPE_CHECKING:
    import torch

OVERRIDES = "overrides"
"""The field, where a class has it, that takes options of other names: (("train.lr", "1e-4"), ...)."""


REPLACED = {"--int8": "--weights int8"}
"""Options of before, and what does their work now."""


class Options(Protocol):
    """The form of a class of options: a dataclass with examples."""

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
    """A positional argument; its help, and what stands for its value there."""

    help: str
    metavar: str = ""


@dataclass(frozen=True)
class Parameter:
    """One field of an options class, as the parser needs it."""

    field: str
    kind: Any
    """The type of one value, without None."""
    several: bool
    default: Any
    annotation: Flag | Argument

    @property
    def shown(self) -> str:
        """Its name on the command line."""
        if isinstance(self.annotation, Argument):
            return self.annotation.metavar or self.field.upper()
        return "--" + (self.annotation.name or self.field.replace("_", "-"))

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        choices = ",".join(typing.get_args(self.kind)) if typing.get_origin(self.kind) is Literal else ""
        return self.annotation.metavar or (f"{{{choices}}}" if choices else self.field.upper())

    @property
    def help(self) -> str:
        """Its help, with a default that says something."""
        worth_saying = self.kind is not bool and self.default not in ("", None, (), dataclasses.MISSING)
        return (self.annotation.help + (f" (default: {self.default})" if worth_saying else "")).replace("%", "%%")


def parameters(cls: type[Options]) -> list[Parameter]:
    """The fields of an options class that the command line gives one by one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [_parameter(field, hints[field.name]) for field in dataclasses.fields(cls) if field.name != OVERRIDES]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    kind, annotation = typing.get_args(hint)
    assert isinstance(annotation, (Flag, Argument)), f"{field.name} has no help"
    several = typing.get_origin(kind) is tuple
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    single = kind if not parts or typing.get_origin(kind) is Literal else parts[0]
    return Parameter(field.name, single, several, field.default, annotation)


def parse(cls: type[T], command: str, words: Sequence[str]) -> T:
    """The options that a command line gives. `--help` prints and exits with code 0.

    Raises:
        UserError: an unknown option, a missing or wrong value.

    >>> @dataclass(frozen=True)
    ... class Draw:
    ...     \"\"\"Draw pictures.\"\"\"
    ...     EXAMPLES: ClassVar[str] = "starflow draw apple"
    ...     prompt: typing.Annotated[str, Argument("what to show")]
    ...     num_images: typing.Annotated[int, Flag("pictures", "N")] = 1
    >>> parse(Draw, "draw", ["apple", "--num-images", "4"])
    Draw(prompt='apple', num_images=4)
    >>> parse(Draw, "draw", ["apple", "--num-images", "x"])
    Traceback (most recent call last):
    starflow.errors.UserError: --num-images is 'x', expected a whole number
    """
    known = parameters(cls)
    overridable = OVERRIDES in cls.__dataclass_fields__
    flags = [one.shown for one in known if isinstance(one.annotation, Flag)]
    rest, overrides = split_overrides(words, flags) if overridable else (list(words), [])
    found, unknown = _parser(cls, known, command).parse_known_args(rest)
    if unknown and unknown[0] in REPLACED:
        raise UserError(f"{unknown[0]} is now {REPLACED[unknown[0]]}: write that instead")
    if unknown:
        raise UserError(_unknown_option(unknown[0], flags, command))
    given = {one.field: _value(one, getattr(found, one.field)) for one in known}
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


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser(cls: type[Options], known: Sequence[Parameter], command: str) -> _Parser:
    """The parser of a command, which leaves values as texts."""
    parser = _Parser(
        prog=f"starflow {command}",
        description=_dedent(cls.__doc__ or ""),
        epilog="examples:\n" + textwrap.indent(_dedent(cls.EXAMPLES), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for one in known:
        required = one.default is dataclasses.MISSING
        if one.kind is bool:
            parser.add_argument(one.shown, dest=one.field, action="store_true", help=one.help)
        elif isinstance(one.annotation, Flag):
            action: Any = "append" if one.several else "store"
            default = None if required or one.several else one.default
            parser.add_argument(
                one.shown,
                dest=one.field,
                action=action,
                required=required,
                default=default,
                metavar=one.metavar,
                help=one.help,
            )
        else:
            count = {(True, True): "+", (True, False): "*", (False, True): None, (False, False): "?"}
            nargs: Any = count[one.several, required]
            optional = {} if required else {"default": one.default}
            parser.add_argument(one.field, nargs=nargs, metavar=one.metavar, help=one.help, **optional)
    return parser


def _dedent(text: str) -> str:
    """A docstring's text, whose first line may stand beside the quotes."""
    first, newline, rest = text.strip().partition("\n")
    return first + newline + textwrap.dedent(rest)


def _value(one: Parameter, found: Any) -> Any:
    """A parameter's value, from the text or texts that were given; a default is left as it is."""
    if found == []:  # what argparse makes of "--flag=--"
        raise UserError(f"{one.shown} is '--', expected a value")
    if one.several:
        return tuple(_convert(one, text) for text in found or ())
    return _convert(one, found) if isinstance(found, str) and found != one.default else found


def _convert(one: Parameter, text: str) -> Any:
    if typing.get_origin(one.kind) is Literal:
        if text in typing.get_args(one.kind):
            return text
        raise UserError(f"{one.shown} is '{text}', expected one of {', '.join(typing.get_args(one.kind))}")
    try:
        return one.kind(text)
    except ValueError:
        raise UserError(f"{one.shown} is '{text}', expected a {'whole ' * (one.kind is int)}number") from None


def _unknown_option(word: str, flags: Sequence[str], command: str) -> str:
    """What to say of a word that no parameter takes."""
    if not word.startswith("-"):
        return f"unexpected argument '{word}': put a text of several words in quotes"
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, [flag for flag in flags if flag != name], n=1, cutoff=0.7)
    return f"unknown option '{word}': " + (f"did you mean '{near[0]}'?" if near else f"see starflow {command} --help")


OTHER_FORMATS = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Endings of pictures that we do not write."""

LONGEST_NAME = 60
"""Characters of a prompt, at most, in a file's name."""


@dataclass(frozen=True)
class OutputTarget:
    """Where pictures are written: a folder for PNG files, or one file of it."""

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
    """A prompt as part of a file name: letters and digits of any script, in lower case, other runs as one hyphen.

    >>> slug("A red Apple, please!")
    'a-red-apple-please'
    """
    from starflow.conditioning.text import name_emoji

    words = re.findall(r"\w+", name_emoji(text).casefold().replace("_", " "))
    return "-".join(words)[:LONGEST_NAME].rstrip("-")


Device = Literal["auto", "cpu", "cuda", "mps"]

Precision = Literal["float32", "bfloat16"]

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]

CacheDtype = Literal["network", "bfloat16"]

LARGEST_SEED = 2**63 - 1
"""The greatest seed that a generator takes."""


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "64x48", in pixels.

    Raises:
        UserError: another form.

    >>> parse_size("64x48")
    (64, 48)
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


@contextmanager
def collection_off() -> Iterator[None]:
    """A context for imports and weights, which leave no cycles behind: to look for them takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
