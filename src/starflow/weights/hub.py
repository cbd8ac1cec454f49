"""Where models come from and go to: the bundled one, a folder, the Hugging Face hub."""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.pipeline import StarFlowPipeline

BUNDLED = ("glyphs",)
"""Names of the models that ship with the package."""


def find_model(name: str) -> Path:
    """The folder of a model: a bundled name, a folder, or a hub repository ("owner/name"), which is downloaded once.

    Raises:
        UserError: none of the three, or the hub has it not or cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in BUNDLED:
        return bundled_folder(name)
    if name.count("/") != 1 or folder.is_absolute() or name.startswith("."):
        raise UserError(f"no model '{name}': expected a folder, a hub repository (owner/name) or {', '.join(BUNDLED)}")
    return _download(name)


def bundled_folder(name: str) -> Path:
    """Folder of a model that ships with the package."""
    folder = Path(str(resources.files("starflow"))) / "bundled" / name
    if not folder.is_dir():
        raise UserError(f"the bundled model '{name}' is missing from this installation: install starflow again")
    return folder


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    failure: Exception | None = None
    for local_files_only in (True, False):  # a cached model needs no network
        try:
            folder = snapshot_download(
                repository,
                allow_patterns=["*.json", "*.safetensors", "*.md", "NOTICE"],
                local_files_only=local_files_only,
            )
            return Path(folder)
        except (OSError, HFValidationError) as error:  # the hub's HTTP and cache errors are OSErrors
            failure = error
    reason = str(failure).strip().split("\n")[0]
    raise UserError(
        f"no folder '{repository}', and the hub did not give it ({reason}): check the name and the connection"
    )


def push_pipeline(pipeline: StarFlowPipeline, repository: str, private: bool = False) -> str:
    """Upload a pipeline's folder with a model card; returns the commit's address.

    Raises:
        UserError: not logged in, no right to write, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(pipeline), encoding="utf-8")
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder)
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot push to '{repository}' ({reason}): log in with `hf auth login`") from None
    return str(commit.commit_url)


def model_card(pipeline: StarFlowPipeline) -> str:
    """A card for the hub: what the model is, its sizes, and how to use it."""
    config, flow = pipeline.config, pipeline.flow
    count = sum(parameter.numel() for parameter in flow.parameters())
    reads = "no condition" if config.conditioner is None else f"{config.conditioner.kind} conditions"
    return "\n".join(
        [
            "---",
            "library_name: starflow",
            "pipeline_tag: text-to-image",
            "---",
            f"# {config.name}",
            "",
            f"A normalizing flow ({type(flow).__name__}, {count / 1e6:.1f} M parameters), {config.image_size} px,",
            f"{reads},",
            f"trained with noise of {config.noise_std:g} on its inputs.",
            "",
            "```python",
            "from starflow import StarFlowPipeline",
            "",
            'pipe = StarFlowPipeline.from_pretrained("owner/name")',
            f"images = pipe(num_images=4, guidance={config.guidance:g}, seed=0).images",
            "```",
            "",
        ]
    )
