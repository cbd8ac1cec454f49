"""A published checkpoint becomes a pipeline's folder, in bounded memory, with every key and option accounted for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow import STARFlow, StarFlowPipeline, TarFlow
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import Flow
from starflow.io.files import read_json
from starflow.pipeline.config import trained_sizes
from starflow.pipeline.folder import read_config
from starflow.pipeline.from_published import NO_OVERRIDES, PipelineOverrides, convert, pipeline_config
from starflow.published import convert as flows
from tests.checkpoints import DEPRECATED, arguments, model, write_checkpoint
from tests.registry import randomised


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published"))


def same(found: Flow, expected: Flow, dtype: torch.dtype = torch.bfloat16) -> bool:
    theirs = expected.state_dict()
    return all(torch.equal(tensor, theirs[name].to(dtype)) for name, tensor in found.state_dict().items())


def test_the_released_dialect_becomes_a_pipeline(file: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = convert(file, arguments(), tmp_path / "model", progress=lambda *both: told.append(both))
    assert done.whole
    assert done.ignored_keys == list(DEPRECATED)
    assert done.ignored_options == ["drop_label", "latent_norm_regularization", "no_flip", "fsdp", "lr", "wds"]
    assert done.parameters == sum(one.numel() for one in model().parameters())
    assert told[-1] == (done.bytes, done.bytes)
    flow = STARFlow.from_pretrained(tmp_path / "model")
    assert flow.config == model().config
    assert flow.network_dtype == torch.bfloat16
    assert same(flow, model())
    config = read_json(tmp_path / "model" / "config.json")
    assert (config["image_size"], config["noise_std"], config["guidance"]) == (32, 0.3, 2.5)
    assert config["cleaning"] == "tweedie"
    assert config["autoencoder"]["source"] == "stabilityai/sd-vae-ft-ema"
    assert (config["autoencoder"]["kind"], config["autoencoder"]["factor"]) == ("diffusers_kl", 8)
    assert config["conditioner"] | {"names": None} == {
        "kind": "text", "size": 8, "dim": 16, "source": "google/flan-t5-xl", "names": None, "dtype": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_is_the_one_asked_for_and_shards_have_checksums(
    file: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    convert(file, arguments(), tmp_path, dtype, shard_bytes=100_000)
    shards = sorted((tmp_path / "flow").glob("*.safetensors"))
    assert len(shards) > 2
    assert set(read_json(tmp_path / "flow" / "checksums.json")) == {path.name for path in shards}
    flow = STARFlow.from_pretrained(tmp_path)
    assert flow.network_dtype == dtype
    assert same(flow, model(), dtype)


def test_a_shard_is_all_that_is_held(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cast one at a time, when the writer has taken the one before."""
    held: list[int] = []
    cast = flows._cast

    def watched(*all_: Any) -> Any:
        for number, pair in enumerate(cast(*all_)):
            held.append(number)
            yield pair

    monkeypatch.setattr(flows, "_cast", watched)
    from starflow.io.weights import ShardWriter

    add, most = ShardWriter.add, [0]

    def adding(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        add(self, name, tensor)
        most[0] = max(most[0], self._bytes)
        assert held[-1] == len(held) - 1

    monkeypatch.setattr(ShardWriter, "add", adding)
    convert(file, arguments(), tmp_path, shard_bytes=50_000)
    largest = max(tensor.numel() * 2 for tensor in model().state_dict().values())
    assert most[0] <= max(50_000, largest)


def test_the_constructors_dialect_is_a_flow_alone_or_with_an_autoencoder(file: Path, tmp_path: Path) -> None:
    options = {"in_channels": 4, "img_size": 4, "channels": 64, "num_blocks": 2, "layers_per_block": [1, 2],
               "txt_size": 8, "lr": 1e-4}  # fmt: skip
    done = convert(file, options, tmp_path / "alone")
    assert (done.whole, done.ignored_options) == (False, ["lr"])
    assert same(STARFlow.from_pretrained(tmp_path / "alone"), model())
    around = PipelineOverrides(
        "stabilityai/sd-vae-ft-mse", "google/flan-t5-xl", noise_std=0.2, guidance=3.0, aspects=("1:1", "16:9")
    )
    convert(file, options, tmp_path / "whole", overrides=around)
    config = read_json(tmp_path / "whole" / "config.json")
    assert trained_sizes(read_config(tmp_path / "whole"), model().config) == [(32, 32), (40, 24)]
    with pytest.raises(UserError, match=r"a flow alone is written, which keeps no noise_std, aspects: give an autoenc"):
        convert(file, options, tmp_path / "no", overrides=PipelineOverrides(noise_std=0.2, aspects=("1:1",)))
    assert (config["image_size"], config["noise_std"], config["guidance"]) == (32, 0.2, 3.0)
    with pytest.raises(UserError, match="reads 8 tokens of width 16, and its options name no text encoder: name it"):
        convert(file, options, tmp_path / "no", overrides=PipelineOverrides("stabilityai/sd-vae-ft-mse"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("classes", [0, 3])
def test_tarflow_is_a_pipeline_of_pixels(tmp_path: Path, classes: int) -> None:
    config = TarFlowConfig(
        in_channels=3, img_size=8, patch_size=4, channels=64, num_blocks=2, layers_per_block=1, num_classes=classes
    )
    built = randomised(config, 0)
    assert isinstance(built, TarFlow)
    tensors = {name: tensor for name, tensor in built.state_dict().items() if name != "var"}
    torch.save({**tensors, "blocks.1.attn_mask": torch.ones(4, 4)}, tmp_path / "afhq.pth")
    options = {"kind": "tarflow", "in_channels": 3, "img_size": 8, "patch_size": 4, "channels": 64, "num_blocks": 2,
               "layers_per_block": 1}  # fmt: skip
    around = PipelineOverrides(noise_std=0.07)
    done = convert(tmp_path / "afhq.pth", options, tmp_path / "model", torch.float32, around)
    assert done.ignored_keys == ["blocks.1.attn_mask"]
    pipeline = StarFlowPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.flow.config == config
    assert same(pipeline.flow, built, torch.float32)
    prompt = "2" if classes else ""
    image = pipeline(prompt, guidance=0.0).images[0]
    assert image.size == (8, 8)
    assert pipeline.config.noise_std == 0.07


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (arguments(chanels=1), "unknown key 'chanels': did you mean 'channels'?"),
        (arguments() | {"lr": 1}, "unknown key 'lr' beside 'arguments'"),
        ({"arguments": [*arguments()["arguments"], {"channels": 65}]}, "'channels' is given twice, as 64 and as 65"),
        (arguments(img_size=36), "img_size is 36 pixels, expected a multiple of the autoencoder's factor 8"),
        (arguments(layers_per_block="1 1"), "unexpected: blocks.1.attn_blocks.1."),
        (arguments(channel_size=3), "other shapes: blocks.0.sos_embed (1, 1, 4) instead of (1, 1, 3)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        convert(file, options, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_video_model_is_refused_by_name(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, **{"learnable_self_denoiser.0.weight": torch.ones(1)})
    with pytest.raises(UserError, match=re.escape(f"{file} is a video model (it has learnable_self_denoiser.*)")):
        convert(file, arguments(), tmp_path / "model")


def test_room_on_the_disk_is_looked_for_first(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"in bfloat16 takes 0\.0 GB in .*flow, and 0\.0 GB are free there: make room"):
        convert(file, arguments(), tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_broken_conversion_leaves_no_config(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(file, arguments(), tmp_path)

    def interrupted(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(file, arguments(), tmp_path, torch.float32, progress=interrupted)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_autoencoder_and_a_text_encoder_must_fit(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"d_model": 32}))
    with pytest.raises(UserError, match="has width 32, the model expects 16"):
        convert(file, arguments(), tmp_path / "model", overrides=PipelineOverrides(text_encoder=str(tmp_path / "text")))
    (tmp_path / "text" / "config.json").write_text(json.dumps({"d_model": 16}))
    convert(file, arguments(), tmp_path / "model", overrides=PipelineOverrides(text_encoder=str(tmp_path / "text")))
    assert read_json(tmp_path / "model" / "config.json")["conditioner"]["source"] == str((tmp_path / "text").resolve())


def test_what_the_options_do_not_say_is_said(file: Path, tmp_path: Path) -> None:
    """Without a noise level samples stay noisy, and without a guidance weight they are unguided."""
    with pytest.warns(UserWarning, match="the options name no") as found:
        pipeline_config("m", TarFlowConfig(3, 8, 4, 64, 2, 1, num_classes=2), {}, NO_OVERRIDES)
    texts = [str(warning.message) for warning in found]
    assert any("no noise level" in text and "--noise-std" in text for text in texts)
    assert any("no guidance weight" in text and "--guidance" in text for text in texts)


def test_the_bundled_models_autoencoder_by_its_name() -> None:
    own = STARFlowConfig(in_channels=24, img_size=8, channels=64, num_blocks=2, layers_per_block=1)
    config = pipeline_config("m", own, {"noise_std": 0.3, "cfg": 1.0}, PipelineOverrides(autoencoder="glyphs"))
    assert (config.autoencoder.kind, config.autoencoder.channels, config.image_size) == ("small", 24, 64)
    assert Path(config.autoencoder.source).is_dir()
