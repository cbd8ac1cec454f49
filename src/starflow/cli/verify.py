"""`starflow info --verify`: every file of a model against the digest that was made when it was written or uploaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from starflow import shards
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.components.config import PipelineConfig

State = Literal["ok", "damaged", "unknown"]
SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".model")


@dataclass(frozen=True)
class Verified:
    """One file: what it is, and by what."""

    path: Path
    state: State
    by: str


def verify(folder: Path, config: PipelineConfig, read: Callable[[int], None] = lambda _: None) -> list[Verified]:
    """Check a pipeline's files, and those of its parts that lie elsewhere on this machine.

    Args:
        folder: the pipeline's.
        config: its configuration.
        read: told of every so many bytes.

    Raises:
        UserError: a file differs from its digest; every such file is named. A file is missing.
    """
    folders = places(folder, config)
    found = [checked for place in folders for checked in _of_folder(place, read)]
    wrong = [one for one in found if one.state == "damaged"]
    if wrong:
        named = ", ".join(f"{one.path} (by {one.by})" for one in wrong)
        raise UserError(f"{len(wrong)} of {len(found)} files are damaged: {named}; {shards.AGAIN}")
    for inner in {path.parent for place in folders for path in _files(place)}:
        shards.check_sizes(inner)  # of what has no digest, and for what is missing
    return found


def places(folder: Path, config: PipelineConfig) -> list[Path]:
    """The pipeline's folder, and those of the parts that it names elsewhere, as far as they are here."""
    from starflow.components.folder import place_of
    from starflow.conditioning.text import resolve
    from starflow.hub import Fetch, local_or_hub

    here = Fetch(offline=True)
    found = [folder]
    for spec in (config.autoencoder, config.conditioner):
        source = place_of(spec, folder) if spec else ""
        if not source or Path(source).is_relative_to(folder):
            continue
        try:
            found.append(resolve(source, here) if spec is config.conditioner else local_or_hub(source, (), fetch=here))
        except UserError as error:
            if "sha256" in str(error):  # the packaged encoder, which is compared whenever it is found
                raise
    return found


def total_bytes(folders: list[Path]) -> int:
    """What `verify` is going to read."""
    return sum(path.stat().st_size for folder in folders for path in _files(folder))


def _of_folder(folder: Path, read: Callable[[int], None]) -> Iterator[Verified]:
    for path in _files(folder):
        known = shards.checksums(path.parent).get(path.name)
        if known is None:
            yield Verified(path, *_by_the_cache(path))
            continue
        fine = path.stat().st_size == known.bytes and shards.sha256_of(path, read) == known.sha256
        yield Verified(path, "ok" if fine else "damaged", shards.CHECKSUMS)


def _by_the_cache(path: Path) -> tuple[State, str]:
    from starflow.conditioning.text import MINILM_MODULE
    from starflow.hub import is_intact

    if MINILM_MODULE in path.parts and path.suffix == ".safetensors":
        return "ok", "its package's digest"  # which is compared whenever it is found
    states: dict[bool | None, State] = {True: "ok", False: "damaged", None: "unknown"}
    intact = is_intact(path)
    return states[intact], "no digest" if intact is None else "the hub's digest"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in SUFFIXES)
