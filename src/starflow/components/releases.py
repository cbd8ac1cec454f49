"""Published repositories by their own names: fetched, converted once into a cache, and from then on found there.

    CACHE/converted/apple--starflow/refs.json                   {"main": DIGEST}
    CACHE/converted/apple--starflow/DIGEST-bfloat16/            a pipeline's folder, and the licence that came along

Contract: CACHE is STARFLOW_CACHE, or the folder of downloads where that is given. What is converted is used without
asking anybody, whether or not the download is still there; two names of the same file share a conversion. The terms
that the weights come under are shown once. Room on the disk is looked for before the download.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from starflow import files
from starflow.components.published import convert
from starflow.errors import UserError
from starflow.hub import HERE, Fetch, size_to_fetch, snapshot, split_revision
from starflow.weights.convert import Progress
from starflow.weights.hub import find_model
from starflow.weights.releases import RELEASES, Release

Precision = Literal["float32", "bfloat16"]
SHOWN = "licence-shown"
ALONG = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
"""What is kept beside the weights, as it came."""
BYTES = {"float32": 4, "bfloat16": 2}


def say(text: str) -> None:
    """A line for whoever is at the terminal."""
    sys.stderr.write(text + "\n")


def is_release(name: str) -> bool:
    """Whether a name is that of a published repository, and not of a folder here."""
    return name.partition("@")[0] in RELEASES and not Path(name).is_dir()


def find_pipeline(
    name: str, fetch: Fetch = HERE, precision: Precision = "bfloat16", note: Callable[[str], None] = say
) -> Path:
    """As `find_model`, and of a published repository the converted folder; fetches and converts it the first time.

    Args:
        name: bundled name, folder, or hub repository, perhaps with a revision after "@".
        fetch: the hub's revision, cache and whether to ask the network.
        precision: of converted weights.
        note: told the terms of the weights, once.

    Raises:
        UserError: as `find_model`; a damaged checkpoint; no room on the disk.
    """
    if not is_release(name):
        return find_model(name, fetch)
    repository, revision = split_revision(name, fetch)
    root = _root(fetch) / "converted" / repository.replace("/", "--")
    revision = revision or "main"
    known = _refs(root).get(revision)
    if known and (folder := root / f"{known}-{precision}") and (folder / "config.json").is_file():
        return folder
    return _fetch_and_convert(repository, revision, root, fetch, precision, note)


def _fetch_and_convert(
    repository: str, revision: str, root: Path, fetch: Fetch, precision: Precision, note: Callable[[str], None]
) -> Path:
    release = RELEASES[repository]
    named = f"{repository}@{revision}"
    to_fetch = size_to_fetch(named, release.file, fetch)
    if to_fetch:  # a checkpoint is in float32, as far as is known before it is there
        written = to_fetch // 4 * BYTES[precision]
        files.check_room(
            root, to_fetch + written, f"'{repository}', to fetch ({to_fetch / 1e9:.1f} GB) and to convert,"
        )
    came = snapshot(named, [release.file, *ALONG], needed=[release.file], fetch=fetch.elsewhere)
    file = came / release.file
    if not file.is_file():
        raise UserError(f"the hub's '{named}' has no {release.file}: name a revision that has it")
    digest = _digest(file)
    folder = root / f"{digest}-{precision}"
    with files.alone_in(folder):
        if not (folder / "config.json").is_file():
            _show_terms(repository, release, came, root, note)
            for path in _along(came):
                shutil.copyfile(path, folder / path.name)
            note(f"converting {release.file} to {precision}, once: {folder}")
            with progress_bar("converting") as progress:
                convert(file, release.options, folder, getattr(torch, precision), name=repository, progress=progress)
    files.write_json(root / "refs.json", _refs(root) | {revision: digest})
    return folder


def _show_terms(repository: str, release: Release, came: Path, root: Path, note: Callable[[str], None]) -> None:
    """Say the licence of the weights, if that has not been said here before."""
    if (root / SHOWN).exists():
        return
    licence = next((path for path in _along(came) if path.name.startswith(("LICENSE", "LICENCE"))), None)
    where = f"{licence}" if licence else f"https://huggingface.co/{repository}"
    name = _licence_name(came / "README.md")
    under = f"under the licence '{name}'" if name else "under its authors' own licence"
    note(f"the weights of {repository} come {under}, {release.terms}, not under starflow's: read {where}")
    files.write_text(root / SHOWN, f"{under}, {where}\n")


def _licence_name(card: Path) -> str:
    """What the head of a card says, "" where it says nothing."""
    if not card.is_file():
        return ""
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    found = dict(re.findall(r"^(license(?:_name)?):\s*(\S+)\s*$", head[1], re.MULTILINE)) if len(head) > 2 else {}
    return str(found.get("license_name") or found.get("license", ""))


def _along(came: Path) -> list[Path]:
    return sorted(path for pattern in ALONG for path in came.glob(pattern))


def _digest(file: Path) -> str:
    """A name for the file's contents: the hub's digest, or the commit where its cache has no links."""
    blob = file.resolve()
    return (blob.name if blob.parent.name == "blobs" else file.parent.name)[:16]


def _refs(root: Path) -> dict[str, str]:
    path = root / "refs.json"
    values = files.read_json(path) if path.is_file() else {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _root(fetch: Fetch) -> Path:
    return Path(fetch.cache).expanduser() if fetch.cache else files.cache_folder()


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar over bytes, on a terminal, once there is something to wait for."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=what, leave=False, disable=None, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
