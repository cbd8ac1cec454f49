"""Fetching from the Hugging Face hub: the local cache first, then the network, and a clear line where neither has it.

Knows no model. Nothing that is downloaded is ever run: callers name the files they read, and weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starflow.errors import UserError

REMEDY = "name a folder that is there, or a repository of the hub, and check the connection"


def local_or_hub(source: str, needed: Sequence[str], also: Sequence[str] = (), remedy: str = REMEDY) -> Path:
    """The folder `source` if it is one, else a snapshot of the hub repository of that name.

    Args:
        source: a folder, or a repository such as "google/flan-t5-xl".
        needed: file names with wildcards, at the top of the repository; each must match something.
        also: others to fetch where the repository has them.
        remedy: what to do where this fails, for the message.

    Raises:
        UserError: no such folder, and the hub has no such repository or cannot be reached; or a needed file is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = snapshot(source, [*needed, *also], top_only=True, needed=needed, remedy=remedy)
    missing = _missing(folder, needed)
    if missing:
        raise UserError(f"{folder} has no {' and no '.join(missing)}: {remedy}")
    return folder


def snapshot(
    repository: str, files: Sequence[str], *, top_only: bool, needed: Sequence[str], remedy: str = REMEDY
) -> Path:
    """Local folder of a hub repository: the cached one where it has what is needed, else downloaded.

    Args:
        repository: such as "google/flan-t5-xl".
        files: wildcards of what to fetch.
        top_only: leave out sub-folders.
        needed: wildcards, each of which must match something at the top of a cached folder for it to do.
        remedy: what to do where this fails, for the message.

    Raises:
        UserError: the hub has no such repository or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    failure: Exception | None = None
    ignored = ["*/*"] if top_only else []
    for local_files_only in (True, False):  # a cached model needs no network, and never changes under its user
        try:
            folder = snapshot_download(
                repository, allow_patterns=list(files), ignore_patterns=ignored, local_files_only=local_files_only
            )
        except (OSError, HFValidationError) as error:  # the hub's HTTP and cache errors are OSErrors
            failure = error
        else:
            if not local_files_only or not _missing(Path(folder), needed):
                return Path(folder)
    reason = str(failure).strip().split("\n")[0] if failure else "incomplete"
    raise UserError(f"'{repository}' is no folder, and the hub did not give it ({reason}): {remedy}") from None


def _missing(folder: Path, patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if not any(folder.glob(pattern))]
