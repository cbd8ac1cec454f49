"""Models from the hub and to it, by huggingface_hub's own client against a local one: states, and every fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow.model import STARFlow
from starflow.io.hub import HubOptions, is_intact
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.locate import find_model
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, random_pipeline
from tests.local_hub import READ_ONLY, TOKEN, Hub, Repository, used

NAME = "someone/shapes"


def pipeline() -> StarFlowPipeline:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    return random_pipeline("shapes", SmallLatents(network, 0.1), ClassLabels(CLASSES))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose flow lies in several shards."""
    folder = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(folder, shard_bytes=4000)
    assert len(list((folder / "flow").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with used(monkeypatch, tmp_path) as running:
        yield running


def picture(model: str | Path, **settings: object) -> bytes:
    loaded = StarFlowPipeline.from_pretrained(model, **settings)  # type: ignore[arg-type]
    return loaded("star").images[0].tobytes()


def test_a_repository_is_its_folder(hub: Hub, model: Path) -> None:
    hub.put(NAME, model)
    assert picture(NAME) == picture(model)
    flow = STARFlow.from_pretrained(NAME)
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), pipeline().flow.parameters(), strict=True))


def test_what_is_cached_asks_nobody(hub: Hub, model: Path) -> None:
    hub.put(NAME, model)
    first = picture(NAME)
    hub.asked.clear()
    assert picture(NAME) == picture(NAME, offline=True) == first
    hub.repositories[NAME].commit({"config.json": b"{}"})  # it does not change under its user
    assert picture(NAME) == first
    assert not hub.asked


def test_a_revision_by_argument_or_after_the_name(hub: Hub, model: Path, tmp_path: Path) -> None:
    other = random_pipeline("shapes", pipeline().autoencoder, ClassLabels(CLASSES))
    for parameter in other.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    other.save_pretrained(tmp_path / "other")
    old = hub.put(NAME, tmp_path / "other", "v1")
    hub.put(NAME, model, "main")
    new, before = picture(model), picture(tmp_path / "other")
    assert new != before
    assert picture(NAME) == new
    for revision in ("v1", old):
        assert picture(NAME, revision=revision) == picture(f"{NAME}@{revision}") == before
    assert picture(f"{NAME}@main") == new
    with pytest.raises(UserError, match="names the revision v1, and main is asked for: choose one"):
        picture(f"{NAME}@v1", revision="main")


def test_a_cache_of_ones_own(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.put(NAME, model)
    folder = find_model(NAME, HubOptions(cache=tmp_path / "mine"))
    assert folder.is_relative_to(tmp_path / "mine")
    assert picture(NAME, cache=tmp_path / "mine", offline=True) == picture(model)
    with pytest.raises(UserError, match="not in the cache"):
        picture(NAME, offline=True)


def refusal(model: str = NAME, **settings: object) -> str:
    """The one line that asking for a model comes to."""
    with pytest.raises(UserError) as raised:
        find_model(model, HubOptions(**settings))  # type: ignore[arg-type]
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_repository_that_is_not_there(hub: Hub, model: Path) -> None:
    hub.put(NAME, model)
    assert refusal("someone/shape") == (
        "'someone/shape' is no folder, and the hub did not give it (no such repository, or a private one): "
        "check the name, or log in with `hf auth login`"
    )
    assert "it has no revision 'v9'): name a branch, tag or commit" in refusal(f"{NAME}@v9")
    hub.repositories["someone/empty"] = Repository()
    hub.repositories["someone/empty"].commit({"README.md": b"# nothing"})
    with pytest.raises(UserError, match=r"'someone/empty' holds no model of ours: it has no config.json"):
        picture("someone/empty")


def test_tokens_and_terms(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(NAME, model)
    hub.repositories[NAME].gated = True
    said = refusal()
    assert "(its terms must be accepted first): accept them at https://huggingface.co/someone/shapes, then log" in said
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "(it does not accept the token): log in with `hf auth login`, or correct HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert picture(NAME) == picture(model)


def test_without_a_network(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.put(NAME, model)
    assert "(it is not in the cache, and the network is switched off): run once with the network" in refusal(
        offline=True
    )
    assert "not in the cache at revision 'v1'" in refusal(f"{NAME}@v1", offline=True)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "the network is switched off" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        assert "(it cannot be reached): check the connection, and HF_ENDPOINT if you set it" in refusal()
    assert picture(NAME) == picture(model)  # which now is cached
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert picture(NAME) == picture(model)


@pytest.mark.parametrize("file", ["config.json", "flow/model-00002-of-", "autoencoder/model.safetensors"])
def test_a_damaged_download_is_named_and_the_next_one_is_whole(hub: Hub, model: Path, file: str) -> None:
    """A byte that differs on the way, which no size shows: small files by git's digest, large ones by sha256."""
    hub.put(NAME, model)
    path = next(path for path in hub.repositories[NAME].files if path.startswith(file))
    hub.damaged.add(path)
    assert refusal() == (
        f"'{path}' of '{NAME}' came damaged, its digest is not the hub's: it was removed, run the same command again"
    )
    hub.damaged.clear()
    assert picture(NAME) == picture(model)
    assert all(is_intact(path) for path in find_model(NAME).rglob("*") if path.is_file())


def test_an_interrupted_download_goes_on(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is lost in the middle of one shard: not loaded in part, and completed by the next call."""
    from huggingface_hub import constants

    hub.put(NAME, model)
    shard = sorted((model / "flow").glob("*.safetensors"))[1].name
    hub.cut.add(f"flow/{shard}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    assert "\n" not in refusal()
    assert shard not in {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.safetensors")}
    hub.cut.clear()
    assert picture(NAME) == picture(model)


def test_there_and_back(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pushed is what loads, with a card that says what it is."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = StarFlowPipeline.from_pretrained(model).push_to_hub("someone/new", licence="apache-2.0")
    files = hub.repositories["someone/new"].commits[address.rsplit("/", 1)[1]]
    assert {"config.json", "README.md", "flow/model.safetensors", "flow/checksums.json"} < set(files)
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: starflow\npipeline_tag: text-to-image\n")
    for part in (
        "license: apache-2.0",
        "`starflow info someone/new --verify`",
        'StarFlowPipeline.from_pretrained("someone/new")',
        'pipe("circle", guidance=1, seed=0).images[0]',
        "| flow | STARFlow,",
        "| condition | 3 classes |",
        "| samples are cleaned by | decoder |",
        "| pictures | 8x8 px, sides in multiples of 4 |",
    ):
        assert part in card, card
    assert picture("someone/new") == picture(model)
    again = StarFlowPipeline.from_pretrained("someone/new").push_to_hub("someone/new")
    assert again != address
    assert not hub.repositories["someone/new"].private
    pipeline().push_to_hub("someone/own", private=True)
    assert hub.repositories["someone/own"].private


def test_the_card_is_what_yaml_and_python_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipeline().push_to_hub(NAME)
    _, head, text = hub.repositories[NAME].files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "starflow"
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "(it asks for a token, and there is none): log in with `hf auth login`"),
        ("hf_bad", "(it does not accept the token): log in with `hf auth login`, or correct HF_TOKEN"),
        (READ_ONLY, "(the token has no right to it): use a token with that right"),
    ],
)
def test_a_push_that_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as raised:
        pipeline().push_to_hub(NAME)
    assert str(raised.value).startswith(f"cannot push to '{NAME}' (")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert NAME not in hub.repositories


def test_a_push_to_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"cannot push to 'not/a/name' \(.*\)"):
        pipeline().push_to_hub("not/a/name")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"cannot push .*\(it cannot be reached\): check the connection"):
        pipeline().push_to_hub(NAME)


def test_a_folder_a_run_and_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(model)) == model
    shutil.copytree(model, tmp_path / "run" / "model")
    assert find_model(str(tmp_path / "run")) == tmp_path / "run" / "model"
    assert picture(tmp_path / "run") == picture(model)
    for folder in (model, model / "flow", tmp_path / "run"):
        assert STARFlow.from_pretrained(folder).config == pipeline().flow.config
    monkeypatch.chdir(tmp_path)
    assert find_model("glyphs").name == "glyphs"
    for wrong in ("glyphz", "/nowhere", "./run/nothing", "a/b/c", "glyphs@v1"):
        with pytest.raises(UserError, match="no model '.*expected a folder, a hub repository"):
            find_model(wrong)


def test_a_shard_of_the_cache_that_rots_is_named(hub: Hub, model: Path) -> None:
    """Its size is compared at every load, its digest by --verify (tests/cli/test_info.py)."""
    hub.put(NAME, model)
    shard = sorted((find_model(NAME) / "flow").glob("*.safetensors"))[1]
    shard.resolve().write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{shard.name} is not a whole safetensors file"):
        picture(NAME)


def test_an_index_says_where_tensors_are(model: Path) -> None:
    values = json.loads((model / "flow" / "model.safetensors.index.json").read_text())
    assert set(values["weight_map"]) == set(pipeline().flow.state_dict())


def test_the_guides_python_runs(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks of docs/hub.md as they stand, but for the folder of the cache."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shutil.copytree(model, tmp_path / "runs" / "tiny" / "model")
    hub.put("owner/name", model, "main", "v1")
    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    exec("\n".join(blocks).replace("/data/models", str(constants.HF_HUB_CACHE)), {})
    assert "README.md" in hub.repositories["owner/name"].files
    assert (tmp_path / "folder" / "config.json").is_file()
