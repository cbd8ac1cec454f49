"""`from_pretrained("apple/starflow")` against a local hub: fetched, its terms shown once, converted once, and drawn."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from starflow import STARFlow, StarFlowPipeline
from starflow.cli.main import main
from starflow.errors import UserError
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.pipeline import locate
from starflow.pipeline.locate import find_pipeline
from starflow.published.convert import RELEASES, PublishedRelease
from tests.checkpoints import FILE, arguments, model, write_checkpoint
from tests.conditioning.test_conditioning import flan  # noqa: F401  # a fixture
from tests.latents.test_diffusers import save_sd_vae
from tests.local_hub import Hub, used
from tests.test_readme import commands

NAME = "apple/starflow"
CARD = "---\nlicense: apple-amlr\n---\n# weights\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The repository with a tiny checkpoint, under the options of its size."""
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "starflow"))
    monkeypatch.setitem(RELEASES, NAME, PublishedRelease(FILE, arguments(), "for research only"))
    folder = write_checkpoint(tmp_path / "repository").parent
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Research only.")
    with used(monkeypatch, tmp_path) as running:
        running.put(NAME, folder, "main", "v1")
        yield running


def converted(tmp_path: Path) -> list[Path]:
    return sorted(
        path.parent for path in (tmp_path / "starflow" / "converted").rglob("config.json") if path.parent.name != "flow"
    )


def test_fetched_and_converted_once_with_its_terms(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    folder = find_pipeline(NAME, note=said.append)
    assert f"the weights of {NAME} come under the licence 'apple-amlr', for research only" in said[0]
    assert said[0].endswith("LICENSE")
    assert (folder / "LICENSE").read_text() == "Research only."
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    said.clear()
    hub.asked.clear()
    assert find_pipeline(NAME, note=said.append) == folder
    assert find_pipeline(NAME, HubOptions(offline=True), note=said.append) == folder
    shutil.rmtree(tmp_path / "cache")  # the download is not needed any more
    hub.down = True
    assert find_pipeline(NAME, note=said.append) == folder
    assert not hub.asked
    assert not said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written


def test_two_names_of_a_file_share_it_and_another_precision_is_another(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    folder = find_pipeline(NAME, note=said.append)
    assert find_pipeline(f"{NAME}@v1", note=said.append) == folder
    wide = find_pipeline(NAME, precision="float32", note=said.append)
    assert converted(tmp_path) == sorted([folder, wide])
    assert sum("come under the licence" in line for line in said) == 1
    mine = find_pipeline(NAME, HubOptions(cache=tmp_path / "mine"), note=said.append)
    assert mine.is_relative_to(tmp_path / "mine" / "converted")


def test_what_is_wrong_is_said_in_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="it has no revision 'v9'"):
        find_pipeline(f"{NAME}@v9")
    with pytest.raises(UserError, match="it is not in the cache.*network is switched off"):
        find_pipeline(NAME, HubOptions(offline=True))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        hub.asked.clear()
        with pytest.raises(
            UserError, match=r"'apple/starflow', to fetch \(.* GB\) and to convert, takes .* free there"
        ):
            find_pipeline(NAME)
        assert not [asked for asked in hub.asked if asked.startswith("GET") and FILE in asked]
    hub.damaged.add(FILE)
    with pytest.raises(UserError, match=f"'{FILE}' of '{NAME}' came damaged"):
        find_pipeline(NAME)
    assert not converted(tmp_path)
    hub.damaged.clear()
    find_pipeline(NAME, note=lambda _: None)
    assert len(converted(tmp_path)) == 1


def test_an_interrupted_conversion_is_made_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def broken(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(files, "write_tensors", broken)
        with pytest.raises(KeyboardInterrupt):
            find_pipeline(NAME, note=lambda _: None)
    assert not converted(tmp_path)
    folder = find_pipeline(NAME, note=lambda _: None)
    found, expected = (next(one.iter_blocks()).proj_in.weight for one in (STARFlow.from_pretrained(folder), model()))
    assert torch.equal(found, expected.bfloat16())


def test_a_folder_of_that_name_is_a_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_pipeline(NAME) == Path(NAME)
    assert not locate.is_release(NAME)


def test_one_line_draws_a_picture(
    hub: Hub,
    flan: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the text encoder and the autoencoder that the options name, from the same hub."""
    hub.put("google/flan-t5-xl", flan)
    hub.put("stabilityai/sd-vae-ft-ema", save_sd_vae(tmp_path / "vae"))
    monkeypatch.chdir(tmp_path)
    (line,) = commands("The published weights")  # of the README
    name, *words = shlex.split(line)
    assert name == "starflow"
    assert NAME in words
    assert main([*words, "--device", "cpu"]) == 0
    assert "come under the licence 'apple-amlr'" in capsys.readouterr().err
    assert (tmp_path / "out" / "a-red-apple-0000.png").is_file()
    pipeline = StarFlowPipeline.from_pretrained(NAME)
    assert pipeline.flow.network_dtype == torch.float32  # it is small
    assert pipeline.conditioner is not None
    assert pipeline.conditioner.spec.dtype == "bfloat16"
    assert "come under" not in capsys.readouterr().err
    half = StarFlowPipeline.from_pretrained(NAME, dtype=torch.bfloat16)
    assert half.flow.network_dtype == torch.bfloat16
