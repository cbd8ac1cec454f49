"""`starflow bench calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

from starflow.cli.bench import policy_text, timings_text
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.policy import BlockPolicy, Timing, read_policy
from tests.cli.conftest import Run, fails


def test_a_policy_is_written_beside_the_weights_and_found_there(run: Run, classes: Path) -> None:
    result = run("bench", "calibrate", classes, "--batches", "1,2", "--repeats", 1, "--tolerance", 0.01)
    assert result.code == 0, result.err
    assert "blocks by how hard they are to iterate" in result.out
    assert str(classes / "flow" / "policy.json") in result.out
    pipeline = StarFlowPipeline.from_pretrained(classes)
    known = read_policy(pipeline.flow)
    assert known is not None
    assert [[timing.batch for timing in choice.timings] for choice in known.choices] == [[1, 2]] * len(known.choices)
    assert f"choices for cpu, {known.tokens} tokens, guided, float32" in result.out
    assert known.tolerance == 0.01
    assert len(known.convergence) == pipeline.flow.config.num_blocks
    (classes / "flow" / "policy.json").unlink()


def test_elsewhere_and_as_json(run: Run, classes: Path, tmp_path: Path) -> None:
    result = run("bench", "calibrate", classes, "--batches", 1, "--repeats", 1, "--output", tmp_path / "here", "--json")
    told = json.loads(result.out)
    stored = json.loads((tmp_path / "here" / "policy.json").read_text())
    assert {key: told[key] for key in stored} == stored
    assert not (classes / "flow" / "policy.json").exists()


def test_what_was_measured_is_said_at_every_batch() -> None:
    exact, iterated = (Timing(1, 0.5, 0.5), Timing(4, 1.0, 1.0)), (Timing(1, 0.25, 0.5, 1e-3),)
    assert timings_text(exact) == "batch 1 0.5000 s, batch 4 1.0000 s"
    assert timings_text(iterated) == "batch 1 0.2500 s (token by token 0.5000, off by 1e-03)"
    drafted = BlockPolicy("jacobi", 32, guess="gaussian", draft=True)
    assert policy_text(drafted) == "segments of 32 from gaussian, drafted in bfloat16"
    assert policy_text(BlockPolicy()) == "token by token"


def test_bad_input(run: Run, classes: Path) -> None:
    fails(run("bench", "calibrate", classes, "--batches", "1,x"), "--batches is '1,x', expected whole numbers above 0")
    fails(run("bench", "calibrate", classes, "--tolerance", 0), "--tolerance is 0, expected above 0")
    fails(run("bench", "calibrate", classes, "--repeats", 0), "--repeats is 0")
    fails(run("bench", "calibrate", "nowhere"), "no model 'nowhere'")
