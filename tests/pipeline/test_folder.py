"""A pipeline's parts: which lie in its folder, which are named, and which decodes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from starflow import conditioning as loading
from starflow.conditioning import ClassLabels, ConditionerSpec, OnDemandTextEncoder, TextEncoder
from starflow.data.images import from_pil, to_pil
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.latents import Autoencoder, KLLatents, PixelLatents, TinyLatents, save_trainable
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents, save_small
from starflow.pipeline.config import Cleaning, PipelineConfig
from starflow.pipeline.folder import Parts, default_dtype, read_config
from starflow.pipeline.locate import part_folders
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, random_pipeline
from tests.conditioning.conftest import bert  # noqa: F401  # a fixture
from tests.latents.test_diffusers import drawing, save_sd_vae, taesd  # noqa: F401  # a fixture


def latent_pipeline(autoencoder: Autoencoder, side: int = 32, noise_std: float = 0.1) -> StarFlowPipeline:
    """A random flow of two blocks on an autoencoder's latents."""
    torch.manual_seed(0)
    spec = autoencoder.spec
    cells = side // spec.factor
    flow = STARFlow(STARFlowConfig(spec.channels, cells, 16, num_blocks=2, layers_per_block=1, head_dim=16))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    way: Cleaning = "decoder" if spec.noise_std else "tweedie"
    return StarFlowPipeline(flow, autoencoder, None, PipelineConfig("latents", side, noise_std, spec, cleaning=way))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd_vae(tmp_path_factory.mktemp("sd-vae"))


@pytest.fixture
def reading(vae: Path, bert: Path) -> StarFlowPipeline:  # noqa: F811
    """A pipeline of sd-vae's kind with a text encoder, both from folders elsewhere."""
    encoder = TextEncoder.from_pretrained(str(bert), 6)
    torch.manual_seed(0)
    flow = STARFlow(STARFlowConfig(4, 4, 32, num_blocks=2, layers_per_block=1, head_dim=32, txt_size=6, txt_dim=8))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    autoencoder = KLLatents.from_pretrained(str(vae))
    config = PipelineConfig("reading", 32, 0.1, autoencoder.spec, encoder.spec, 1.0, "tweedie")
    return StarFlowPipeline(flow, autoencoder, encoder, config)


def picture(pipeline: StarFlowPipeline, prompt: str = "a red apple") -> bytes:
    return pipeline(prompt, seed=3).images[0].tobytes()


@pytest.mark.parametrize(("parts", "inside"), [("own", False), ("local", True), ("all", True)])
def test_parts_of_folders_are_named_or_written(
    reading: StarFlowPipeline, tmp_path: Path, parts: Parts, inside: bool
) -> None:
    reading.save_pretrained(tmp_path / "model", parts=parts)
    modes = {path.stat().st_mode for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert len(modes) == 1  # who may read one file may read all
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (stored["autoencoder"]["source"] == "./autoencoder") is inside
    assert (stored["conditioner"]["source"] == "./conditioner") is inside
    for name in ("autoencoder", "conditioner"):
        assert (tmp_path / "model" / name / "config.json").is_file() is inside
        assert (tmp_path / "model" / name / "checksums.json").is_file() is inside
        assert inside or Path(stored[name]["source"]).is_absolute()  # holds in any working directory
    (tmp_path / "model").rename(tmp_path / "moved")
    assert picture(StarFlowPipeline.from_pretrained(tmp_path / "moved")) == picture(reading)


def test_what_lies_inside_goes_along(reading: StarFlowPipeline, tmp_path: Path) -> None:
    """Saved again from the folder, by default, and then the first folder goes."""
    reading.save_pretrained(tmp_path / "one", parts="all")
    StarFlowPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    assert picture(StarFlowPipeline.from_pretrained(tmp_path / "two")) == picture(reading)


def test_names_of_the_hub_stay_names(tmp_path: Path) -> None:
    pipeline = latent_pipeline(
        KLLatents(KLLatents.from_pretrained(str(save_sd_vae(tmp_path / "vae"))).network, "a/vae")
    )
    pipeline.save_pretrained(tmp_path / "model", parts="local")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["autoencoder"]["source"] == "a/vae"
    pipeline.save_pretrained(tmp_path / "model", parts="all")
    loaded = StarFlowPipeline.from_pretrained(tmp_path / "model")
    assert picture(loaded, "") == picture(pipeline, "")


def test_the_text_encoder_is_released_unless_kept(
    reading: StarFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading.save_pretrained(tmp_path, parts="all")
    prompts = ["a red apple", "a blue car", ""]
    expected = reading(prompts, num_images=2).latents
    lazy = StarFlowPipeline.from_pretrained(tmp_path, keep_text_encoder=False)
    assert isinstance(lazy.conditioner, OnDemandTextEncoder)
    loads = []
    original = OnDemandTextEncoder.load

    def counting(released: OnDemandTextEncoder) -> TextEncoder:
        loads.append(released)
        return original(released)

    monkeypatch.setattr(OnDemandTextEncoder, "load", counting)
    found = lazy(prompts, num_images=2, batch_size=1).latents
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert len(loads) == 1  # for six batches
    lazy.remember_prompts(["a tree", "a car"])
    lazy("a tree")
    lazy.log_prob(lazy("a car").images[0], "a car")
    assert len(loads) == 2
    kept = StarFlowPipeline.from_pretrained(tmp_path)
    assert isinstance(kept.conditioner, TextEncoder)  # a small one
    monkeypatch.setattr(loading, "LARGE_BYTES", 100)
    assert isinstance(StarFlowPipeline.from_pretrained(tmp_path).conditioner, OnDemandTextEncoder)
    assert isinstance(StarFlowPipeline.from_pretrained(tmp_path, keep_text_encoder=True).conditioner, TextEncoder)
    lazy.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "conditioner" / "model.safetensors").is_file()


def test_another_decoder_decodes(vae: Path, tmp_path: Path) -> None:
    """The same latents through another decoder; that of other latents is refused, as its own encoder shows."""
    main = latent_pipeline(KLLatents.from_pretrained(str(vae)))
    main.save_pretrained(tmp_path / "model")
    save_sd_vae(tmp_path / "foreign", seed=5)
    with pytest.raises(UserError, match=r"foreign' is for other latents than the model's .* name one of the same"):
        StarFlowPipeline.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "foreign"))
    tuned: Any = KLLatents.from_pretrained(str(vae)).network  # as `train-decoder` leaves it: the encoder stays
    with torch.no_grad():
        for parameter in tuned.decoder.parameters():
            parameter.mul_(1.1)
    tuned.to(torch.bfloat16).save_pretrained(tmp_path / "other")  # rounding is no other encoder
    other = KLLatents.from_pretrained(str(tmp_path / "other"))
    pipeline = StarFlowPipeline.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "other"))
    made = pipeline(seed=3, cleaning="none")
    assert torch.equal(made.latents, main(seed=3, cleaning="none").latents)
    assert made.images[0].tobytes() == to_pil(other.decode(made.latents).detach())[0].tobytes()
    assert made.images[0].tobytes() != main(seed=3, cleaning="none").images[0].tobytes()
    pipeline.save_pretrained(tmp_path / "again")  # keeps the model's own
    assert picture(StarFlowPipeline.from_pretrained(tmp_path / "again"), "") == picture(main, "")


def test_the_way_out_of_the_noise_is_the_decoders(vae: Path, tmp_path: Path) -> None:
    """One that was trained for noise needs no Tweedie step, and one that was not needs it."""
    latent_pipeline(KLLatents.from_pretrained(str(vae))).save_pretrained(tmp_path / "plain")
    trained = KLLatents.from_pretrained(str(vae), noise_std=0.1)
    save_trainable(trained, tmp_path / "tuned", 0.1)
    latent_pipeline(trained).save_pretrained(tmp_path / "own", parts="all")
    cases: tuple[tuple[str, str | None, Cleaning], ...] = (
        ("plain", None, "tweedie"),
        ("plain", str(tmp_path / "tuned"), "decoder"),
        ("own", None, "decoder"),
        ("own", str(vae), "tweedie"),
    )
    for model, decoder, way in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # they are of one encoder
            pipeline = StarFlowPipeline.from_pretrained(tmp_path / model, decoder=decoder)
        default = pipeline(seed=1).images[0]
        named = pipeline(seed=1, cleaning=way).images[0]
        assert default.tobytes() == named.tobytes(), (model, decoder)


def test_a_decoder_of_other_latents_is_refused(vae: Path, tmp_path: Path) -> None:
    latent_pipeline(KLLatents.from_pretrained(str(vae))).save_pretrained(tmp_path / "model")
    save_small(SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(4,))), tmp_path / "small", 0.1)
    with pytest.raises(
        UserError, match="is for latents of 4 channels, 2 pixels a side, the model's have 4 channels, 8"
    ):
        StarFlowPipeline.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "small"))
    with pytest.raises(UserError, match="has no config.json"):
        StarFlowPipeline.from_pretrained(tmp_path / "model", decoder=str(tmp_path), offline=True)


def test_taesd_draws_previews_of_real_latents(taesd: Path, tmp_path: Path) -> None:  # noqa: F811
    """A picture through the flow and back, and out of TAESD's decoder: what comes out is what went in."""
    pipeline = latent_pipeline(TinyLatents.from_pretrained(str(taesd)), side=128)
    pipeline.save_pretrained(tmp_path / "model", parts="all")
    loaded = StarFlowPipeline.from_pretrained(tmp_path / "model", decoder=str(taesd))
    image = to_pil(drawing(128))[0]
    shown = loaded.decode(loaded.encode(image))
    assert not isinstance(shown, list)
    error = ((from_pil(shown) - from_pil(image)) / 2).square().mean()
    assert -10 * torch.log10(error) > 28
    means = [numpy.asarray(one.resize((4, 4), Image.Resampling.BOX), dtype=float) for one in (shown, image)]
    assert numpy.abs(means[0] - means[1]).max() < 20  # the apple is red and the sky is blue, where they were


def test_a_small_pipelines_parts_are_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    pipeline = random_pipeline("small", SmallLatents(network, 0.1), ClassLabels(CLASSES))
    pipeline.save_pretrained(tmp_path, shard_bytes=5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "config.json", "flow"]
    assert len(list((tmp_path / "flow").glob("model-*.safetensors"))) > 1
    assert picture(StarFlowPipeline.from_pretrained(tmp_path), "star") == picture(pipeline, "star")


def test_only_a_large_flow_stays_in_the_stored_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES)).flow.to(torch.bfloat16)
    assert default_dtype(flow) == torch.float32
    monkeypatch.setattr("starflow.pipeline.folder.LARGE", 1000)
    assert default_dtype(flow) == torch.bfloat16
    assert default_dtype(flow.to(torch.float32)) == torch.float32


def test_a_newer_format_is_refused_before_its_keys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"autoencoder": {}, "format": 2, "novelty": 1}')
    with pytest.raises(UserError, match=r"config\.json has format 2, expected 1 or less: update starflow"):
        read_config(tmp_path)


class Own:
    """A conditioner that no library of ours knows: one token, of the prompt's length."""

    def __init__(self, size: int = 1, dim: int = 4) -> None:
        self.spec = ConditionerSpec("text", size, dim, "own")
        self.network = torch.nn.Identity()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([torch.full((1, self.spec.dim), float(len(prompt))) for prompt in prompts])

    def null(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, self.spec.dim)


def test_a_conditioner_of_ones_own_is_said_at_saving_and_given_again(tmp_path: Path) -> None:
    made = random_pipeline("own", PixelLatents(), Own())
    with pytest.warns(UserWarning, match=r"the conditioner, a Own, is your own and is not saved: .*conditioner=YOURS"):
        made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"reads 1 condition tokens.* names no conditioner: .*conditioner=YOURS"):
        StarFlowPipeline.from_pretrained(tmp_path)
    again = StarFlowPipeline.from_pretrained(tmp_path, conditioner=Own())
    assert torch.equal(again("abc", seed=1).latents, made("abc", seed=1).latents)
    with pytest.raises(UserError, match="gives 2 tokens of width 3, the flow reads 1 of width"):
        StarFlowPipeline.from_pretrained(tmp_path, conditioner=Own(2, 3))


def test_a_flow_alone_is_told_how_it_becomes_a_pipeline(tmp_path: Path) -> None:
    random_pipeline("flow", PixelLatents(), None).flow.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="holds no pipeline but a flow alone.*convert FILE --options OPTIONS --autoencoder NAME"
    ):
        StarFlowPipeline.from_pretrained(tmp_path)


def test_the_folders_of_parts_that_lie_elsewhere_are_found(
    reading: StarFlowPipeline,
    vae: Path,
    bert: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name, parts, folders in (("own", "own", [vae, bert]), ("all", "all", [])):
        folder = tmp_path / name
        reading.save_pretrained(folder, parts=parts)  # type: ignore[arg-type]
        assert part_folders(folder, read_config(folder)) == [folder, *folders]
    shutil.copytree(tmp_path / "own", tmp_path / "lost")
    lost = read_config(tmp_path / "lost")
    gone = dataclasses.replace(lost, autoencoder=dataclasses.replace(lost.autoencoder, source="owner/nowhere"))
    assert part_folders(tmp_path / "lost", gone) == [tmp_path / "lost", bert]
