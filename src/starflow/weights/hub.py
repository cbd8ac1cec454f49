"""Where models come from and go to: the bundled one, a folder, the Hugging Face hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from starflow.errors import UserError
from starflow.hub import snapshot

BUNDLED = ("glyphs",)
"""Names of the models that ship with the package."""


def find_model(name: str) -> Path:
    """The folder of a model: a bundled name, a folder, or a hub repository ("owner/name"), which is downloaded once.

    Raises:
        UserError: none of the three, or the hub has it not or cannot be reached.
    """
    if name in BUNDLED:  # before a folder of that name in the working directory: ./glyphs is how to mean that one
        return bundled_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        raise UserError(f"no model '{name}': expected a folder, a hub repository (owner/name) or {', '.join(BUNDLED)}")
    return snapshot(name, ["*.json", "*.safetensors", "*.md", "NOTICE"], top_only=False, needed=["config.json"])


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
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder)
    except (HFValidationError, OSError) as error:  # the hub's HTTP and token errors are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot push to '{repository}' ({reason}): log in with `hf auth login`") from None
    return str(commit.commit_url)


def model_card(name: str, facts: str, prompt: str, guidance: float) -> str:
    """A card for the hub: what the model is, in one line of `facts`, and how to use it."""
    return "\n".join(
        [
            "---",
            "library_name: starflow",
            "pipeline_tag: text-to-image",
            "---",
            f"# {name}",
            "",
            facts,
            "",
            "```python",
            "from starflow import StarFlowPipeline",
            "",
            f'pipe = StarFlowPipeline.from_pretrained("{name}")',
            f'pipe("{prompt}", num_images=4, guidance={guidance:g}, seed=0).images[0].save("picture.png")',
            "```",
            "",
        ]
    )
