"""Models are found by name, fetched, converted and checked: the bundled one, folders, and repositories of the hub.

Published repositories are found by their own names; each is fetched and converted once, and from then on found in the
cache:

    CACHE/converted/apple--starflow/refs.json                   {"main": DIGEST}
    CACHE/converted/apple--starflow/DIGEST-bfloat16/            a pipeline's folder, and the licence that came along

Contract: CACHE is STARFLOW_CACHE, or the folder of downloads where that is given. What is converted is used without
asking the network, whether or not the download is still there; two names of the same file share a conversion. The terms
that the weights come under are shown once. Room on the disk is looked for before the download. `verify` compares every
file of a model with the digest that was made when it was written or uploaded.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from starflow.conditioning.text import MINILM_MODULE, DamagedPackageError, find_text_encoder
from starflow.errors import UserError
from starflow.flow.memory import BYTES
from starflow.io import files, weights
from starflow.io.hub import (
    DEFAULT_HUB,
    HubError,
    HubOptions,
    download_size,
    explain_hub_error,
    hub_errors,
    is_intact,
    local_or_hub,
    snapshot,
    split_revision,
)
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.folder import BUNDLED, bundled_folder, part_source
from starflow.pipeline.from_published import convert
from starflow.published.convert import RELEASES, ByteProgress, PublishedRelease

PIPELINE_FILES = ("*.json", "*.safetensors", "*.md", "NOTICE", "LICENSE*", "*/*.model", "*/*.txt")
"""What is fetched of a pipeline's repository: its folders' configs, weights and tokenizers, and who made it."""

COMPANION_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
"""What is kept, as it came, beside the converted weights of a published repository."""

TERMS_SHOWN = "licence-shown"
"""A file in the cache whose presence means that the licence of a repository has been named."""

VERIFIED_SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".model")
"""Endings of the files that `verify` looks at."""

Precision = Literal["float32", "bfloat16"]

FileState = Literal["ok", "damaged", "unknown"]
"""Of a file against its digest; "unknown" where no digest was kept."""


def print_note(text: str) -> None:
    """Write a line on stderr."""
    sys.stderr.write(text + "\n")


def find_model(name: str, hub: HubOptions = DEFAULT_HUB) -> Path:
    """The folder of a pipeline, which holds its config.json.

    Args:
        name: a bundled name, a folder (a pipeline's, or a training run's with model/ in it), or a hub repository,
            "owner/name" or "owner/name@revision", which is downloaded once.
        hub: the hub's revision, cache and whether to ask the network.

    Raises:
        UserError: none of these, or the hub does not have it or cannot be reached (`HubError`).

    >>> find_model("glyphs").name
    'glyphs'
    """
    if name in BUNDLED:  # before a folder of that name in the working directory: ./glyphs is how to mean that one
        return bundled_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        run = folder / "model"
        return run if not (folder / "config.json").exists() and (run / "config.json").is_file() else folder
    repository, _ = split_revision(name, hub)
    if repository.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        raise UserError(f"no model '{name}': expected a folder, a hub repository (owner/name) or {', '.join(BUNDLED)}")
    folder = snapshot(name, PIPELINE_FILES, required=["config.json"], hub=hub)
    if not (folder / "config.json").is_file():
        raise HubError(f"the hub's '{name}' holds no model of ours: it has no config.json, as push_to_hub writes it")
    return folder


def find_pipeline(
    name: str,
    hub: HubOptions = DEFAULT_HUB,
    precision: Precision = "bfloat16",
    note: Callable[[str], None] = print_note,
) -> Path:
    """The folder of a pipeline, as by `find_model`; a published repository is fetched and converted the first time.

    Args:
        name: bundled name, folder, or hub repository, perhaps with a revision after "@".
        hub: the hub's revision, cache and whether to ask the network.
        precision: of converted weights.
        note: told the terms of the weights, once.

    Raises:
        UserError: as `find_model`; a damaged checkpoint; no room on the disk.
    """
    if not is_release(name):
        return find_model(name, hub)
    repository, revision = split_revision(name, hub)
    root = _root(hub) / "converted" / repository.replace("/", "--")
    revision = revision or "main"
    known = _refs(root).get(revision)
    if known and (folder := root / f"{known}-{precision}") and (folder / "config.json").is_file():
        return folder
    return _fetch_and_convert(repository, revision, root, hub, precision, note)


def is_release(name: str) -> bool:
    """Whether a name is that of a published repository, and not of a folder here.

    >>> is_release("apple/starflow@main"), is_release("glyphs")
    (True, False)
    """
    return name.partition("@")[0] in RELEASES and not Path(name).is_dir()


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder to a hub repository, made where it is missing; returns the commit's address.

    Raises:
        UserError: not logged in, no right to write, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    # A ValueError is a name that no repository can have, or an answer that makes no sense.
    expected: tuple[type[BaseException], ...] = (ValueError, *hub_errors())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by starflow")
    except expected as error:
        reason, better = explain_hub_error(error, repository)
        raise UserError(
            f"cannot push to '{repository}' ({reason}): {better or 'log in with `hf auth login`'}"
        ) from None
    return str(commit.commit_url)


@dataclass(frozen=True)
class VerifiedFile:
    """One file, its state, and the digest that says so."""

    path: Path
    state: FileState
    by: str


def verify(folder: Path, config: PipelineConfig, on_read: Callable[[int], None] = lambda _: None) -> list[VerifiedFile]:
    """Check a pipeline's files, and those of its parts that lie elsewhere on this machine.

    Args:
        folder: the pipeline's.
        config: its configuration.
        on_read: called with the number of bytes read since the last call.

    Raises:
        UserError: a file differs from its digest; every such file is named. A file is missing.
    """
    folders = part_folders(folder, config)
    found = [checked for place in folders for checked in _verify_folder(place, on_read)]
    wrong = [one for one in found if one.state == "damaged"]
    if wrong:
        named = ", ".join(f"{one.path} (by {one.by})" for one in wrong)
        raise UserError(f"{len(wrong)} of {len(found)} files are damaged: {named}; {weights.FETCH_AGAIN}")
    for inner in {path.parent for place in folders for path in _verified_files(place)}:
        weights.check_sizes(inner)  # of what has no digest, and for what is missing
    return found


def part_folders(folder: Path, config: PipelineConfig) -> list[Path]:
    """The pipeline's folder, and those of the parts that it names elsewhere, as far as they are here."""
    here = HubOptions(offline=True)
    found = [folder]
    for spec in (config.autoencoder, config.conditioner):
        source = part_source(spec, folder) if spec else ""
        if not source or Path(source).is_relative_to(folder):
            continue
        try:
            found.append(
                find_text_encoder(source, here) if spec is config.conditioner else local_or_hub(source, (), hub=here)
            )
        except DamagedPackageError:  # the packaged encoder is compared whenever it is found
            raise
        except UserError:
            continue
    return found


def total_bytes(folders: list[Path]) -> int:
    """The number of bytes that `verify` is going to read."""
    return sum(path.stat().st_size for folder in folders for path in _verified_files(folder))


@contextmanager
def progress_bar(what: str) -> Iterator[ByteProgress]:
    """A bar over bytes on a terminal, which appears after a second; yields the function that moves it."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=what, leave=False, disable=None, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _verify_folder(folder: Path, on_read: Callable[[int], None]) -> Iterator[VerifiedFile]:
    for path in _verified_files(folder):
        known = weights.checksums(path.parent).get(path.name)
        if known is None:
            yield VerifiedFile(path, *_state_by_hub(path))
            continue
        fine = path.stat().st_size == known.bytes and weights.sha256_of(path, on_read) == known.sha256
        yield VerifiedFile(path, "ok" if fine else "damaged", weights.CHECKSUMS)


def _state_by_hub(path: Path) -> tuple[FileState, str]:
    """FileState of a file without a digest of ours, and by what it is known."""
    if MINILM_MODULE in path.parts and path.suffix == ".safetensors":
        return "ok", "its package's digest"  # which is compared whenever it is found
    states: dict[bool | None, FileState] = {True: "ok", False: "damaged", None: "unknown"}
    intact = is_intact(path)
    return states[intact], "no digest" if intact is None else "the hub's digest"


def _verified_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in VERIFIED_SUFFIXES)


def _fetch_and_convert(
    repository: str, revision: str, root: Path, hub: HubOptions, precision: Precision, note: Callable[[str], None]
) -> Path:
    release = RELEASES[repository]
    named = f"{repository}@{revision}"
    to_fetch = download_size(named, release.file, hub)
    if to_fetch:  # a checkpoint is in float32, as far as is known before it is there
        written = to_fetch // 4 * BYTES[precision]
        files.check_disk_space(
            root, to_fetch + written, f"'{repository}', to fetch ({to_fetch / 1e9:.1f} GB) and to convert,"
        )
    download = snapshot(named, [release.file, *COMPANION_FILES], required=[release.file], hub=hub.without_revision)
    file = download / release.file
    if not file.is_file():
        raise UserError(f"the hub's '{named}' has no {release.file}: name a revision that has it")
    digest = _digest(file)
    folder = root / f"{digest}-{precision}"
    with files.folder_lock(folder):
        if not (folder / "config.json").is_file():
            _show_terms(repository, release, download, root, note)
            for path in _companions(download):
                shutil.copyfile(path, folder / path.name)
            note(f"converting {release.file} to {precision}, once: {folder}")
            with progress_bar("converting") as progress:
                convert(file, release.options, folder, getattr(torch, precision), name=repository, progress=progress)
    files.write_json(root / "refs.json", _refs(root) | {revision: digest})
    return folder


def _show_terms(
    repository: str, release: PublishedRelease, download: Path, root: Path, note: Callable[[str], None]
) -> None:
    """Say the licence of the weights, if that has not been said here before."""
    if (root / TERMS_SHOWN).exists():
        return
    licence = next((path for path in _companions(download) if path.name.startswith(("LICENSE", "LICENCE"))), None)
    where = f"{licence}" if licence else f"https://huggingface.co/{repository}"
    name = _licence_name(download / "README.md")
    under = f"under the licence '{name}'" if name else "under its authors' own licence"
    note(f"the weights of {repository} come {under}, {release.terms}, not under starflow's: read {where}")
    files.write_text(root / TERMS_SHOWN, f"{under}, {where}\n")


def _licence_name(card: Path) -> str:
    """What the head of a card says, "" where it says nothing."""
    if not card.is_file():
        return ""
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    found = dict(re.findall(r"^(license(?:_name)?):\s*(\S+)\s*$", head[1], re.MULTILINE)) if len(head) > 2 else {}
    return str(found.get("license_name") or found.get("license", ""))


def _companions(download: Path) -> list[Path]:
    return sorted(path for pattern in COMPANION_FILES for path in download.glob(pattern))


def _digest(file: Path) -> str:
    """A name for the file's contents: the hub's digest, or the commit where its cache has no links."""
    blob = file.resolve()
    return (blob.name if blob.parent.name == "blobs" else file.parent.name)[:16]


def _refs(root: Path) -> dict[str, str]:
    path = root / "refs.json"
    values = files.read_json(path) if path.is_file() else {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _root(hub: HubOptions) -> Path:
    return Path(hub.cache).expanduser() if hub.cache else files.cache_folder()
