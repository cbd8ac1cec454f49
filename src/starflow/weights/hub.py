"""Where models come from and go to: the bundled one, a folder, the Hugging Face hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from starflow.errors import UserError
from starflow.hub import HERE, Fetch, explain, hub_errors, snapshot, split_revision

BUNDLED = ("glyphs",)
"""Names of the models that ship with the package."""
FILES = ("*.json", "*.safetensors", "*.md", "NOTICE", "LICENSE*", "*/*.model", "*/*.txt")
"""What is fetched of a pipeline's repository: its folders' configs, weights and tokenizers, and who made it."""


def find_model(name: str, fetch: Fetch = HERE) -> Path:
    """The folder of a pipeline, which holds its config.json.

    Args:
        name: a bundled name, a folder (a pipeline's, or a training run's with model/ in it), or a hub repository,
            "owner/name" or "owner/name@revision", which is downloaded once.
        fetch: the hub's revision, cache and whether to ask the network.

    Raises:
        UserError: none of these, or the hub has it not or cannot be reached.
    """
    if name in BUNDLED:  # before a folder of that name in the working directory: ./glyphs is how to mean that one
        return bundled_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        run = folder / "model"
        return run if not (folder / "config.json").exists() and (run / "config.json").is_file() else folder
    repository, _ = split_revision(name, fetch)
    if repository.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        raise UserError(f"no model '{name}': expected a folder, a hub repository (owner/name) or {', '.join(BUNDLED)}")
    folder = snapshot(name, FILES, needed=["config.json"], fetch=fetch)
    if not (folder / "config.json").is_file():
        raise UserError(f"the hub's '{name}' holds no model of ours: it has no config.json, as push_to_hub writes it")
    return folder


def bundled_folder(name: str) -> Path:
    """Folder of a model that ships with the package."""
    folder = Path(str(resources.files("starflow"))) / "bundled" / name
    if not folder.is_dir():
        raise UserError(f"the bundled model '{name}' is missing from this installation: install starflow again")
    return folder


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
        reason, better = explain(error, repository)
        raise UserError(
            f"cannot push to '{repository}' ({reason}): {better or 'log in with `hf auth login`'}"
        ) from None
    return str(commit.commit_url)
