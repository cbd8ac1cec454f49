"""`starflow info`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from starflow.cli.info import _fits
from starflow.conditioning import ClassLabels
from starflow.latents import PixelLatents
from starflow.pipeline.locate import find_model
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, Run, fails, random_pipeline
from tests.local_hub import used


def test_facts_are_those_of_the_loaded_model(run: Run, text: Path) -> None:
    facts = json.loads(run("info", text, "--json").out)
    pipeline = StarFlowPipeline.from_pretrained(text)
    for name, network in (("flow", pipeline.flow), ("autoencoder", pipeline.autoencoder.network)):
        assert facts[name]["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert facts[name]["megabytes"] == round((text / name / "model.safetensors").stat().st_size / 1e6, 3)
    assert facts["size_multiple"] == pipeline.size_multiple == 4
    assert facts["tokens"] == pipeline.flow.to_tokens(pipeline.encode(pipeline("a red apple").images[0]))[0].shape[1]
    assert (facts["noise_std"], facts["guidance"]) == (0.1, 1.0)
    assert (facts["default_size"], facts["trained_sizes"]) == ("8x8", ["8x8"])
    assert (facts["conditioner"]["tokens"], facts["conditioner"]["width"]) == (6, 8)


def test_a_model_of_one_ratio_says_its_size(run: Run, text: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(text, wide)
    config = json.loads((text / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "image_size": 32, "aspects": ["16:9"]}))
    facts = json.loads(run("info", wide, "--json").out)
    assert (facts["default_size"], facts["trained_sizes"], facts["tokens"]) == ("44x24", ["44x24"], 66)
    assert "pictures of 44x24 (66 tokens), with guidance" in run("info", wide, "--memory").out


def test_a_person_can_read_it(run: Run, classes: Path) -> None:
    out = run("info", classes).out
    assert "kind STARFlow" in out
    assert f"classes {' '.join(CLASSES)}" in out
    assert all(len(line) < 200 for line in out.splitlines())


def test_bad_input(run: Run, classes: Path, tmp_path: Path) -> None:
    fails(run("info", tmp_path), "config.json")
    fails(run("info", classes / "flow"), "holds no pipeline")
    fails(run("info", "nowhere"), "no model 'nowhere'")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    random_pipeline("sharded", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(folder, shard_bytes=8000)
    return folder


def flip(path: Path) -> None:
    """Change the last byte, which no size shows."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_verify_reads_every_file_and_names_the_wrong_shard(run: Run, sharded: Path) -> None:
    shards = sorted((sharded / "flow").glob("*.safetensors"))
    assert len(shards) > 2
    facts = json.loads(run("info", sharded, "--verify", "--json").out)
    assert facts["files"] == {"verified": len(shards), "without_a_digest": []}
    assert facts["flow"]["megabytes"] == round(sum(shard.stat().st_size for shard in shards) / 1e6, 3)
    flip(shards[1])
    StarFlowPipeline.from_pretrained(sharded)  # sizes do not show it
    said = f"1 of {len(list(sharded.rglob('*.*')))} files are damaged: {shards[1]} (by checksums.json); fetch"
    fails(run("info", sharded, "--verify"), said)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    fails(run("info", sharded, "--verify"), f"{shards[1]} (by checksums.json)")
    shards[1].unlink()
    fails(run("info", sharded, "--verify"), f"{shards[1].name}")


def test_files_without_a_digest_are_said(run: Run, sharded: Path) -> None:
    (sharded / "flow" / "checksums.json").unlink()
    facts = json.loads(run("info", sharded, "--verify", "--json").out)
    assert facts["files"]["verified"] == 0
    assert len(facts["files"]["without_a_digest"]) > 2


def test_verify_of_a_hub_model_knows_the_hubs_digests(
    run: Run, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sharded / "flow" / "checksums.json").unlink()
    with used(monkeypatch, tmp_path) as hub:
        hub.put("a/model", sharded)
        found = find_model("a/model")
        files = [path for path in found.rglob("*") if path.is_file()]
        facts = json.loads(run("info", "a/model", "--verify", "--json").out)
        assert facts["files"] == {"verified": len(files), "without_a_digest": []}
        wrong = sorted((found / "flow").glob("*.safetensors"))[0]
        flip(wrong.resolve())
        fails(run("info", "a/model", "--verify"), f"{wrong} (by the hub's digest)")


def test_the_bundled_model_is_whole(run: Run) -> None:
    facts = json.loads(run("info", "glyphs", "--verify", "--json").out)
    assert facts["files"]["verified"] >= 2
    assert facts["files"]["without_a_digest"] == []


def test_memory_of_a_hub_model_fetches_its_configurations_alone(
    run: Run, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with used(monkeypatch, tmp_path) as hub:
        hub.put("a/model", sharded)
        facts = json.loads(run("info", "a/model", "--memory", "--json").out)
        assert not [asked for asked in hub.asked if "safetensors" in asked]
        assert facts["parameters"] == json.loads(run("info", sharded, "--memory", "--json").out)["parameters"]
        fails(run("info", "a/mode", "--memory"), "no such repository")
        assert find_model("a/model").is_dir()  # which then fetches the rest
        assert sorted((find_model("a/model") / "flow").glob("*.safetensors"))


def test_a_row_of_memory_names_what_it_fits() -> None:
    row = {"kind": "bfloat16", "peak": 5 * 2**30, "cpu_peak": 7 * 2**30}
    available = {"this machine": 7 * 2**30, "a card": 6 * 2**30}
    assert _fits(row, available) == "   6"  # the packed copies are this machine's alone
    assert _fits({**row, "cpu_peak": 5 * 2**30}, available) == "  6*"
    assert _fits({**row, "cpu_peak": 5 * 2**30, "kind": "int8 offload"}, available) == "   6"
    assert _fits({**row, "peak": 500 * 2**30}, available) == "   -"


def test_the_tables_of_memory_fit_a_terminal(run: Run) -> None:
    for model in ("glyphs", "starflow-t2i-3b"):
        out = run("info", model, "--memory").out
        assert "fits: the smallest GPU" in out
        assert max(map(len, out.splitlines())) <= 80


def test_a_check_without_gaps_says_none(run: Run) -> None:
    assert "verified 4, without a digest none" in run("info", "--verify").out
