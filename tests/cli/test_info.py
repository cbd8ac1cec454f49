"""`starflow info`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import CLASSES, Run, fails

from starflow.pipeline import StarFlowPipeline


def test_facts_are_those_of_the_loaded_model(run: Run, text: Path) -> None:
    facts = json.loads(run("info", text, "--json").out)
    pipeline = StarFlowPipeline.from_pretrained(text)
    for name, network in (("flow", pipeline.flow), ("autoencoder", pipeline.autoencoder.network)):
        assert facts[name]["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert facts[name]["megabytes"] == round((text / name / "model.safetensors").stat().st_size / 1e6, 3)
    assert facts["size_multiple"] == pipeline.size_multiple == 4
    assert facts["tokens"] == pipeline.flow.tokens(pipeline.encode(pipeline("a red apple").images[0]))[0].shape[1]
    assert (facts["noise_std"], facts["guidance"], facts["image_size"]) == (0.1, 1.0, 8)
    assert (facts["conditioner"]["tokens"], facts["conditioner"]["width"]) == (6, 8)


def test_a_person_can_read_it(run: Run, classes: Path) -> None:
    out = run("info", classes).out
    assert "kind STARFlow" in out
    assert f"classes {' '.join(CLASSES)}" in out
    assert all(len(line) < 200 for line in out.splitlines())


def test_bad_input(run: Run, classes: Path, tmp_path: Path) -> None:
    fails(run("info", tmp_path), "config.json")
    fails(run("info", classes / "flow"), "holds no pipeline")
    fails(run("info", "nowhere"), "no model 'nowhere'")
