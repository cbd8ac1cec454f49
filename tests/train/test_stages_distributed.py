"""Two processes = one, from pictures in a folder: live and joint training, with buckets, sharded and not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from starflow.cli.main import main
from tests.train.distributed.launch import finish, torchrun
from tests.train.distributed.scenario import numbers

RECIPE = """
name: pieces
data:
  source: folder
  path: {path}
  aspects: ["3:2", "1:1"]
  latents: live
  workers: {workers}
  views: {{size: 16}}
autoencoder:
  kind: {kind}
  joint: {joint}
  joint_loss: {terms}
  model: {{channels: 4, widths: [8], encoder_pairs: 1, decoder_pairs: 1}}
conditioning: {{kind: class}}
flow: {{channels: 32, layers_per_block: [1, 1], patch_size: 4, head_dim: 32}}
train:
  steps: 6
  batch: 4
  lr: 1.0e-2
  warmup: 1
  evaluate_every: 3
  sample_every: 6
  checkpoint_every: 3
  parallel: {{layout: {layout}}}
prompts: [a]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "joint", "layout", "workers"),
    [("pixels", "false", "replicated", 2), ("small", "true", "replicated", 0), ("small", "true", "sharded", 0)],
)
def test_two_processes_are_one(tmp_path: Path, kind: str, joint: str, layout: str, workers: int) -> None:
    for n in range(24):
        path = tmp_path / "set" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.radial_gradient("L").rotate(15 * n).resize((24, 24 if n % 3 else 16)).convert("RGB")
        image.save(path)
    recipe = tmp_path / "recipe.yaml"
    terms = "{adversarial: 0.1, adversarial_from: 2}" if joint == "true" else "{}"
    values = {
        "path": tmp_path / "set",
        "kind": kind,
        "joint": joint,
        "terms": terms,
        "layout": layout,
        "workers": workers,
    }
    recipe.write_text(RECIPE.format(**values))
    assert main(["train", str(recipe), "--output", str(tmp_path / "one")]) == 0
    finish(torchrun(2, "starflow", "train", recipe, "--output", tmp_path / "two"))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(one, two, strict=True):
        assert other == pytest.approx(mine, rel=2e-3, abs=2e-4)
    assert (tmp_path / "two" / "model" / "config.json").is_file()
