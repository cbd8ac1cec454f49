"""Folders and files of the Hugging Face hub: the local cache first, then the network, and a clear line if both fail.

Contract: what is cached is used without asking the network, and so never changes under its user; a name may say which
state it means, "owner/name@revision". Every downloaded file is compared with the hub's own digest of it, once, when it
comes; one that differs is removed and named. Nothing that is downloaded is ever run: callers name the files they read,
and weights are safetensors. Token, cache and endpoint are those of huggingface_hub's settings (HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from starflow.errors import UserError
from starflow.io.files import cache_folder

DEFAULT_REMEDY = "name a folder that is there, or a repository of the hub, and check the connection"

_CHUNK = 1 << 22


@dataclass(frozen=True)
class HubOptions:
    """Which revision of a hub repository is meant, and how it may be reached."""

    revision: str | None = None
    """A branch, tag or commit; None is what the name says after "@", or else "main"."""
    cache: str | Path | None = None
    """Folder of downloads; None is huggingface_hub's own."""
    offline: bool = False
    """Take only what is cached."""

    @property
    def without_revision(self) -> HubOptions:
        """The same options for another repository, which has revisions of its own."""
        return dataclasses.replace(self, revision=None)


DEFAULT_HUB = HubOptions()
"""The newest state, from huggingface_hub's own cache or the network."""


def split_revision(name: str, hub: HubOptions = DEFAULT_HUB) -> tuple[str, str | None]:
    """The repository and revision of "owner/name@revision", or of "owner/name" and `hub.revision`.

    Raises:
        UserError: the name and `hub` each give a revision, and they differ.

    >>> split_revision("google/flan-t5-xl@main")
    ('google/flan-t5-xl', 'main')
    """
    repository, _, revision = name.partition("@")
    if revision and hub.revision and revision != hub.revision:
        raise UserError(f"'{name}' names the revision {revision}, and {hub.revision} is asked for: choose one")
    return repository, revision or hub.revision


def local_or_hub(
    source: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    remedy: str = DEFAULT_REMEDY,
    hub: HubOptions = DEFAULT_HUB,
    subfolders: Sequence[str] = ("",),
) -> Path:
    """The folder `source` if it is one, else a snapshot of the hub repository of that name.

    Args:
        source: a folder, or a repository such as "google/flan-t5-xl" or "google/flan-t5-xl@main".
        required: file names with wildcards; each must match something.
        optional: other file names with wildcards, fetched where the repository has them; see `snapshot`.
        remedy: what to do where this fails, for the message.
        hub: the hub's revision, cache and whether to ask the network.
        subfolders: sub-folders that may hold the needed files instead of the top ("").

    Raises:
        UserError: no such folder, and the hub has no such repository or cannot be reached; or a needed file is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = snapshot(source, [*required, *optional], required=required, remedy=remedy, hub=hub)
    missing = min((_missing(folder / inner, required) for inner in subfolders), key=len)
    if missing:
        raise UserError(f"{folder} has no {' and no '.join(missing)}: {remedy}")
    return folder


def snapshot(
    source: str,
    files: Sequence[str],
    *,
    required: Sequence[str],
    remedy: str = DEFAULT_REMEDY,
    hub: HubOptions = DEFAULT_HUB,
) -> Path:
    """Local folder of a hub repository: the cached one where it has what is needed, else downloaded and checked.

    Args:
        source: such as "google/flan-t5-xl", perhaps with a revision after "@".
        files: wildcards of what to fetch; where none of them has a "/", only files at the top are fetched.
        required: wildcards, each of which must match something at the top of a cached folder for it to do.
        remedy: what to do where this fails, for the message, if nothing better is known.
        hub: the hub's revision, cache and whether to ask the network.

    Raises:
        HubError: the hub has no such repository or revision, asks for a login, or cannot be reached.
        UserError: a file came damaged.
    """
    from huggingface_hub.errors import HFValidationError

    repository, revision = split_revision(source, hub)
    settings: dict[str, Any] = {
        "revision": revision,
        "cache_dir": hub.cache,
        "allow_patterns": list(files),
        "ignore_patterns": [] if any("/" in pattern for pattern in files) else ["*/*"],
    }
    expected: tuple[type[BaseException], ...] = (_NotCached, HFValidationError, *hub_errors())
    try:
        folder = _cached(repository, settings)
        usable = folder is not None and not _missing(folder, required) and _has_shards(folder)
        if folder is not None and usable and (hub.offline or _is_completed(folder, files)):
            return folder
        if hub.offline:
            raise _NotCached
        try:
            downloaded = _download(repository, settings)
        except expected:
            if folder is not None and usable:  # nobody can say whether it is whole: the loader will
                return folder
            raise
        _mark_completed(downloaded, files)
        return downloaded
    except expected as error:
        reason, better = explain_hub_error(error, repository, revision)
        remedy = better if better and remedy == DEFAULT_REMEDY else remedy
        raise HubError(f"'{repository}' is no folder, and the hub did not give it ({reason}): {remedy}") from None


class HubError(UserError):
    """The hub did not give what was asked for, or may not be asked."""


class _NotCached(Exception):
    """The repository is not in the cache, and the network is not to be asked."""


def _cached(repository: str, settings: dict[str, Any]) -> Path | None:
    """The cached snapshot, if there is one and it has all of the files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True, **settings))
    except OSError:  # not there, or incomplete
        return None


def _download(repository: str, settings: dict[str, Any]) -> Path:
    """A snapshot from the network, what came now compared with the hub's digests.

    Raises:
        UserError: a file differs; it is removed, so that the next call fetches it again.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(settings["cache_dir"] or constants.HF_HUB_CACHE).expanduser()
    blobs = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    before = {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()
    folder = Path(snapshot_download(repository, local_files_only=False, **settings))
    new = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve().name not in before]
    copies = [path for path in new if path.resolve().parent.name != "blobs"]
    digests = _hub_digests(repository, folder) if copies else {}
    for path in new:
        stated = digests.get(path.relative_to(folder).as_posix())
        if (has_digest(path, stated) if path in copies else is_intact(path)) is False:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            name = path.relative_to(folder).as_posix()
            raise UserError(
                f"'{name}' of '{repository}' came damaged, its digest is not the hub's: it was removed, "
                "run the same command again"
            )
    return folder


def _completion_mark(folder: Path, files: Sequence[str]) -> Path:
    """The empty file that says that the hub was asked once for all of these files of a cached snapshot."""
    name = hashlib.sha256("\n".join([str(folder.resolve()), *sorted(files)]).encode()).hexdigest()
    return cache_folder() / "completed" / name


def _is_completed(folder: Path, files: Sequence[str]) -> bool:
    """Whether a cached snapshot was completed by us; others fetch single files, and a download may have been killed."""
    with suppress(UserError):  # no cache of ours: nobody knows
        return _completion_mark(folder, files).is_file()
    return False


def _mark_completed(folder: Path, files: Sequence[str]) -> None:
    with suppress(OSError, UserError):  # without a mark the hub is asked again
        mark = _completion_mark(folder, files)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def is_intact(path: Path) -> bool | None:
    """Whether a file of the hub's cache is what the hub has; None where the cache does not tell.

    The cache keeps a file under its digest: sha256 of a large one, git's sha1 of a small one.
    """
    blob = path.resolve()
    return has_digest(blob, blob.name) if blob.parent.name == "blobs" else None  # no links, or no file of the cache


def has_digest(path: Path, stated: str | None) -> bool | None:
    """Whether a file has the digest that the hub states, sha256 or git's sha1; None where it states neither."""
    if stated is not None and re.fullmatch("[0-9a-f]{64}", stated):
        digest = hashlib.sha256()
    elif stated is not None and re.fullmatch("[0-9a-f]{40}", stated):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return None
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == stated


def _hub_digests(repository: str, folder: Path) -> dict[str, str]:
    """The digests that the hub states of a snapshot's files, for a cache without links; {} where it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    expected: tuple[type[BaseException], ...] = hub_errors()
    try:
        tree = list(HfApi().list_repo_tree(repository, recursive=True, revision=folder.name))
    except expected:
        return {}
    found = [entry for entry in tree if isinstance(entry, RepoFile)]
    return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found}


def download_size(source: str, file: str, hub: HubOptions = DEFAULT_HUB) -> int:
    """Bytes to download of a repository's file: 0 where it is in the cache, or where the hub does not say.

    Raises:
        UserError: `source` and `hub` name two revisions.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = split_revision(source, hub)
    expected: tuple[type[BaseException], ...] = (HFValidationError, *hub_errors())
    try:
        cached = try_to_load_from_cache(repository, file, cache_dir=hub.cache, revision=revision)
        if hub.offline or isinstance(cached, str):
            return 0
        return get_hf_file_metadata(hf_hub_url(repository, file, revision=revision)).size or 0
    except expected:  # whoever fetches it says what is wrong
        return 0


def explain_hub_error(error: BaseException, repository: str, revision: str | None = None) -> tuple[str, str]:
    """The reason for an error of the hub's client in words, and the remedy ("" where nothing better is known)."""
    from huggingface_hub import errors, get_token

    chain = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repository}"
        return "its terms must be accepted first", f"accept them at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one", "check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision '{revision}'", "name a branch, tag or commit that the repository has"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not get_token():
        return "it asks for a token, and there is none", "log in with `hf auth login`"
    if status == 401:
        return "it does not accept the token", "log in with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return "the token has no right to it", "use a token with that right: `hf auth login`"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token", "log in with `hf auth login`"
    if isinstance(error, _NotCached) or any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        state = f" at revision '{revision}'" if revision else ""
        return f"it is not in the cache{state}, and the network is switched off", "run once with the network"
    if any(type(one).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout") for one in chain):
        return "it cannot be reached", "check the connection, and HF_ENDPOINT if you set it"
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0].rstrip(":. ") if lines else type(error).__name__, ""


def hub_errors() -> tuple[type[BaseException], ...]:
    """The exception types that huggingface_hub raises: errors of HTTP, most of them OSErrors too, and of the system."""
    from huggingface_hub.errors import HfHubHTTPError

    http = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return (OSError, http)


def _has_shards(folder: Path) -> bool:
    """Whether a cached folder has every shard of its indices; a download may have been interrupted."""
    for index in folder.rglob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if not all((index.parent / str(name)).is_file() for name in names):
            return False
    return True


def _missing(folder: Path, patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if not any(folder.glob(pattern))]


TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")
"""The loggers that warn when torchao is imported, as transformers and diffusers do wherever it is installed."""


@contextmanager
def only_errors_logged(*names: str) -> Iterator[None]:
    """A context in which the loggers of these names let only errors through."""
    loggers = [getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
