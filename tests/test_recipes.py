"""Every recipe is read and says what its source says; its tiny sibling trains a few steps on pictures drawn here."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from starflow.data.sets.small import draw_shapes
from starflow.flow.config import config_from_dict, preset
from starflow.flow.model import build
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import Recipe, load_recipe, load_recipe_of
from starflow.train.run import read_log, start_run
from starflow.train.stages import train_flow
from starflow.train.tasks.denoiser import DenoiserRecipe
from starflow.train.tasks.density import DensityRecipe
from starflow.train.tasks.student import StudentRecipe
from tests.conditioning.conftest import WORDS, save_encoder
from tests.conditioning.conftest import t5 as t5  # a fixture

RECIPES = Path(__file__).parent.parent / "recipes"
SCALED = sorted(path.stem for path in (RECIPES / "tiny").glob("*.yaml"))
OTHERS = {
    "tiny",
    "fashion-mnist",
    "glyphs-64",
    "glyphs2-64",
    "glyphs2-128",
    "glyphs2-64-without-fxemoji",
    "glyphs-64-more",
    "glyphs-64-plain",
    "finetune-glyphs",
    "bench-57m",
}
"""Recipes that a processor trains: they are run by tests of their own."""
OF_OTHER_KINDS = {
    "glyphs-64-student": StudentRecipe,
    "glyphs-64-denoiser": DenoiserRecipe,
    "density": DensityRecipe,
}
"""Recipes of what is no flow of pictures; the tests of their tasks train small ones."""


def save_gemma(folder: Path) -> Path:
    """A Gemma 2 of width 64 and three layers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return save_encoder(folder, Gemma2ForCausalLM(config))


def save_vae(folder: Path) -> Path:
    """An AutoencoderKL of sd-vae's shape, eightfold and four channels, but narrow."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Path:
    """A working folder: pictures/ by class in several shapes, the same in shards/, vae/, t5/, gemma/."""
    folder = tmp_path_factory.mktemp("material")
    views = draw_shapes(30, 48, seed=0)
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"0{shard}.tar", "w") as archive:
            for number in range(shard * 15, shard * 15 + 15):
                picture = Image.fromarray(views.images[number].permute(1, 2, 0).numpy())
                picture = picture.crop((0, 0, 48, 48 if number % 3 else 27))
                path = folder / "pictures" / str(views.labels[number]) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                add(archive, f"{number}.png", path.read_bytes())
                add(archive, f"{number}.txt", views.captions[number].encode())
    save_vae(folder / "vae")
    save_gemma(folder / "gemma")
    shutil.copytree(t5, folder / "t5")
    return folder


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def tiny(name: str) -> Recipe:
    """A tiny sibling, with the models that it names as we have them here."""
    overrides = {}
    plain = load_recipe(RECIPES / "tiny" / f"{name}.yaml")
    if plain.autoencoder.kind == "diffusers_kl":
        overrides["autoencoder.source"] = "vae"
    if plain.conditioning.kind == "text":
        overrides["conditioning.encoder"] = "t5"
    return load_recipe(RECIPES / "tiny" / f"{name}.yaml", overrides)


def train(name: str, folder: Path) -> StarFlowPipeline:
    train_flow(start_run(tiny(name), folder, torch.device("cpu"), progress=False))
    return StarFlowPipeline.from_pretrained(folder / "model")


@pytest.mark.parametrize("name", [name for name in SCALED if name != "starflow-imagenet-512"])
def test_the_tiny_sibling_trains(name: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(material)
    pipeline = train(name, tmp_path / "run")
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert len(losses) == 3
    assert all(torch.tensor(losses).isfinite())
    recipe = tiny(name)
    side = recipe.data.views.size
    assert pipeline.config.image_size == side
    assert pipeline("", size=(side, side)).images[0].size == (side, side)
    assert pipeline.config.aspects == (recipe.data.aspects if len(recipe.data.aspects) > 1 else ())
    if name == "starflow-t2i-gemma":
        deep = pipeline.flow.state_dict()["blocks.5.attn_blocks.0.mlp.up_proj.weight"]
        assert deep.shape == (96, 64), "the deep block has the model's own sizes"


def test_the_continuation_goes_on_at_twice_the_size(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material)
    first = train("starflow-imagenet-256", material / "runs" / "tiny-starflow-imagenet-256")
    second = train("starflow-imagenet-512", tmp_path / "run")
    before: Any = first.flow.config
    after: Any = second.flow.config
    assert (before.img_size, after.img_size) == (4, 8)
    assert before.span == after.span == 4, "positions are rescaled to the same span"


@pytest.mark.parametrize("name", SCALED)
def test_a_sibling_has_every_part_of_its_recipe(name: str) -> None:
    large, small = load_recipe(RECIPES / f"{name}.yaml"), tiny(name)
    for part in ("data.source", "data.latents", "data.aspects", "autoencoder.kind", "autoencoder.joint"):
        section, key = part.split(".")
        assert getattr(getattr(large, section), key) == getattr(getattr(small, section), key)
    assert large.conditioning.kind == small.conditioning.kind
    assert large.objective == small.objective
    assert large.flow.kind == small.flow.kind
    assert large.train.parallel == small.train.parallel
    assert bool(large.train.init_from) == bool(small.train.init_from)


def test_every_recipe_has_a_sibling_or_a_run_of_its_own() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SCALED) | OTHERS | set(OF_OTHER_KINDS)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_its_head_names_source_and_expectation(path: Path) -> None:
    if path.stem in OF_OTHER_KINDS:
        load_recipe_of(OF_OTHER_KINDS[path.stem], path)
    else:
        load_recipe(path)
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert head.startswith("# ")
    if path.parent.name == "recipes":
        assert re.search(r"[Ss]ource:", head)
        assert re.search(r"Expected|exact bits per dimension", head)


SIZES = {
    "starflow-imagenet-256": ("starflow-xl", 1.41),
    "starflow-t2i": ("starflow-t2i-3b", 3.86),
    "starflow-t2i-released": ("starflow-t2i-3b", 3.86),
    "tarflow-imagenet-64": ("tarflow-imagenet-64", 0.466),
    "tarflow-afhq-256": ("tarflow-afhq-256", 0.463),
}


@pytest.mark.parametrize(("name", "known"), SIZES.items(), ids=SIZES)
def test_a_published_recipe_is_the_published_architecture(name: str, known: tuple[str, float]) -> None:
    recipe, config = load_recipe(RECIPES / f"{name}.yaml"), preset(known[0]).config
    from_recipe: dict[str, Any] = {
        "in_channels": config.in_channels,
        "img_size": config.img_size,
        **recipe.flow.given(),
    }
    if "num_classes" in vars(config):
        from_recipe["num_classes"] = vars(config)["num_classes"]
    else:
        from_recipe |= {key: vars(config)[key] for key in ("txt_size", "txt_dim")}
    found = config_from_dict(from_recipe)
    assert found == config
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(found).parameters())
    assert count / 1e9 == pytest.approx(known[1], rel=0.01)


def test_the_papers_numbers() -> None:
    """Section 5 of what the papers report."""
    paper, released = (load_recipe(RECIPES / f"starflow-t2i{name}.yaml") for name in ("", "-released"))
    assert (paper.train.batch, paper.train.lr, paper.train.min_lr) == (512, 1e-4, 1e-6)
    assert (released.train.batch, released.train.lr) == (1024, 6.4e-5)
    for recipe in (paper, released, load_recipe(RECIPES / "starflow-imagenet-256.yaml")):
        assert recipe.train.steps * recipe.train.batch == 400_000_000
        assert (recipe.train.betas, recipe.train.eps, recipe.train.weight_decay) == ((0.9, 0.95), 1e-8, 1e-4)
        assert (recipe.objective.noise_std, recipe.objective.drop_condition) == (0.3, 0.1)
        assert recipe.objective.latent_penalty == 1e-4
    assert len(paper.data.aspects) == 9
