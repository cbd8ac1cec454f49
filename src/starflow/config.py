"""Typed configuration: frozen dataclasses that are read from YAML, JSON or dictionaries, strictly.

Contract: an unknown key is an error that names the nearest known one; a value of the wrong type or outside its
`Literal` choices is an error that names the key, what was received and what was expected.
`from_dict(cls, to_dict(config)) == config` for every configuration class of the project.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from starflow.errors import UserError


class Dataclass(Protocol):
    """The type of any dataclass instance."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Dataclass)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the frozen dataclass `cls` from a mapping, strictly.

    Args:
        cls: a dataclass whose fields are scalars, `Literal`s, optionals, tuples or other dataclasses.
        values: keys are field names; lists stand for tuples.
        where: dotted prefix for messages, e.g. `"train"`.

    Raises:
        UserError: unknown key (with the nearest known one), missing key, wrong type, wrong choice.

    >>> from starflow.flow.config import TarFlowConfig
    >>> values = {"in_channels": 3, "img_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 2}
    >>> from_dict(TarFlowConfig, values | {"layers_per_block": [1, 4]}).layers_per_block
    (1, 4)
    >>> from_dict(TarFlowConfig, values | {"layer_per_block": 1})
    Traceback (most recent call last):
    starflow.errors.UserError: unknown key 'layer_per_block': did you mean 'layers_per_block'?
    """
    hints = _type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in known:
            raise UserError(unknown_key_message(f"{where}{key}", key, list(known)))
    built: dict[str, Any] = {}
    for name, field in known.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{where}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"the key '{where}{name}' is missing: add it ({_describe(hints[name])})")
    return cls(**built)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields; a service reads one for every request, and evaluating them takes 0.7 ms."""
    return typing.get_type_hints(cls)


def to_dict(config: Dataclass) -> dict[str, Any]:
    """A configuration as a plain JSON-ready dictionary, in which tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def unknown_key_message(path: str, key: str, known: list[str]) -> str:
    """The message for a key that no field has, with the nearest of the known ones.

    >>> unknown_key_message("train.bach", "bach", ["batch", "steps"])
    "unknown key 'train.bach': did you mean 'batch'?"
    """
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {path!r}: {hint}"


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises:
        UserError: no such file, not text, not valid YAML/JSON, a key that is given twice, or the top level is no
            mapping.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML whose mappings have each key once; PyYAML takes the last one in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _check_keys([key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"], path)
            return super().construct_mapping(node, deep)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_keys([key for key, _ in pairs], path)
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=unique)
        else:
            values = yaml.load(text, UniqueKeyLoader)  # a SafeLoader
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:] or 'YAML'}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a mapping of keys to values")
    return values


def _check_keys(keys: list[Any], path: Path) -> None:
    """Raises UserError: a key of one mapping is given twice, so that one of its values would be lost."""
    twice = [name for name, count in Counter(map(str, keys)).items() if count > 1]
    if twice:
        raise UserError(f"{path} gives the key '{twice[0]}' twice in one mapping: keep one")


def _describe(hint: Any) -> str:
    """A type in words, for messages."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is dict:
        return "a mapping of options"
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return str(getattr(hint, "__name__", hint))


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, or a UserError that names `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where, hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where=f"{where}.")
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    raise UserError(f"'{where}' is {value!r}, expected {_describe(hint)}")


def _convert_union(options: tuple[Any, ...], value: Any, where: str, hint: Any) -> Any:
    if value is None and type(None) in options:
        return None
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, Mapping) and len(nested) == 1:
        return _convert(nested[0], value, where)  # keep its own, more precise message
    for option in options:
        try:
            return _convert(option, value, where)
        except UserError:
            continue
    raise UserError(f"'{where}' is {value!r}, expected {_describe(hint)}")
