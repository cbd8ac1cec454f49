"""Predicted memory is that of the built model, of its caches and of its passes."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from starflow.bench.memory import CompanionShape, predict_memory
from starflow.cli.main import main
from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow import memory
from starflow.flow.config import PRESETS, ModelConfig, STARFlowConfig
from starflow.flow.model import build
from starflow.latents import PixelLatents
from starflow.nn.attention import CachePool
from starflow.nn.quantize import WeightFormat
from starflow.sampling.denoise import Denoiser, DenoiserConfig, denoise
from starflow.sampling.policy import SampleSettings
from starflow.sampling.sampler import run
from starflow.sampling.student import inputs_of
from starflow.train.distributed import checkpoint_activations
from starflow.train.settings import ParallelSettings
from tests.cli.conftest import CLASSES, random_pipeline, with_companions
from tests.registry import configs, randomised

RECIPE = str(Path(__file__).parent.parent.parent / "recipes" / "starflow-t2i.yaml")
DRAWN = settings(max_examples=60, derandomize=True)


@DRAWN
@given(config=configs())
def test_parameters_are_counted_as_built(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build(config)
    for number, block in enumerate(model.iter_blocks()):
        assert memory.block_parameter_count(config, number) == sum(one.numel() for one in block.parameters())
    assert memory.parameter_count(config) == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("options", [{}, {"sos": False}, {"num_kv_heads": 1}, {"cond_top_only": False}])
def test_caches_take_what_is_predicted(options: dict[str, object], guided: bool) -> None:
    config = STARFlowConfig(
        in_channels=2, img_size=4, channels=48, head_dim=24, num_blocks=3, layers_per_block=(1, 2, 1), txt_size=3,
        txt_dim=5, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    pool, noise, condition = CachePool(), torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)
    weight = 1.0 if guided else 0.0
    run(randomised(config, 0), noise, condition, condition, SampleSettings(weight), caches=pool)
    held = sum(
        layer.keys_BNLH.nbytes + layer.values_BNLH.nbytes for cache in pool._caches.values() for layer in cache.layers
    )
    assert memory.cache_bytes(config, 2, 16, "float32", guided=guided) == held


@DRAWN
@given(config=configs(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_packed_weights_are_the_layers_matrices_and_all_else_in_float32(
    config: ModelConfig, dtype: memory.Precision
) -> None:
    with torch.device("meta"):
        model = build(config)
    expected = []
    for block in model.iter_blocks():
        matrices = sum(one.weight.numel() for one in block.attn_blocks.modules() if isinstance(one, nn.Linear))
        parts = (block.attn_blocks, block.proj_in, block.proj_out)
        rest = sum(one.numel() for part in parts for one in part.parameters()) - matrices
        expected.append(memory.BYTES[dtype] * matrices + 4 * rest)
    assert memory.packed_bytes(config, dtype) == sum(expected)
    assert memory.packed_bytes(config, dtype, "int8") < memory.packed_bytes(config, dtype)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_of_a_large_model_only_what_works_is_in_memory(weights: WeightFormat | None) -> None:
    """The packed copies of the other blocks and the weights themselves are mapped from files."""
    config = PRESETS["starflow-t2i-3b"].config
    deep = config.num_blocks - 1
    assert memory.packed_bytes(config, "bfloat16", weights) == pytest.approx(
        memory.block_bytes(config, deep, "bfloat16", weights), rel=0.01
    )
    found = memory.sampling_memory(config, 1, dtype="bfloat16", weights=weights, iterated=False)
    assert found.unpacked == 0
    assert found.cpu_peak == found.packed + found.cache + found.activations


def test_a_small_model_is_in_memory_twice_on_a_cpu() -> None:
    config = PRESETS["tarflow-afhq-256"].config
    small = dataclasses.replace(config, channels=128)
    found = memory.sampling_memory(small, 1, weights="int8")
    assert found.unpacked == memory.weight_bytes(small, "float32") > found.weights > found.packed / 2


def test_a_large_text_encoder_is_gone_before_pictures_and_a_small_one_stays() -> None:
    config = PRESETS["starflow-t2i-3b"].config
    plain = memory.sampling_memory(config, 4, dtype="bfloat16")
    large = memory.sampling_memory(config, 4, dtype="bfloat16", text_encoder="google/flan-t5-xl")
    small = memory.sampling_memory(config, 4, text_encoder="sentence-transformers/all-MiniLM-L6-v2", dtype="bfloat16")
    assert large.text_encoder > memory.KEPT_ENCODER_BYTES > small.text_encoder > 0
    assert large.peak == plain.peak, "sampling four takes more than the encoder"
    assert small.peak == plain.peak + small.text_encoder
    tiny = memory.sampling_memory(config, 1, tokens=4, text_encoder="google/flan-t5-xl", dtype="bfloat16")
    assert tiny.peak == tiny.weights + tiny.text_encoder
    away = memory.sampling_memory(config, 1, tokens=4, text_encoder="google/flan-t5-xl", dtype="bfloat16", offload=True)
    assert away.peak == away.weights + away.cache + away.activations, "offloaded weights are not beside the encoder"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("batch", [1, 40])
def test_what_a_tweedie_step_keeps_is_about_what_is_predicted(
    dtype: memory.Precision, *, swiglu: bool, batch: int
) -> None:
    """Forty pictures of 64 tokens are more than are taken at once."""
    config = STARFlowConfig(
        in_channels=4, img_size=8, channels=192, num_blocks=2, layers_per_block=(1, 3), txt_size=4, txt_dim=16,
        use_swiglu=swiglu, norm_type="rms_norm" if swiglu else "layer_norm", use_qk_norm=swiglu, use_post_norm=swiglu,
    )  # fmt: skip
    model = build(config).requires_grad_(False).to(getattr(torch, dtype))
    x, condition = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 16)
    with Living() as living:
        denoise(model, x, condition)
    predicted = memory.sampling_memory(config, batch, dtype=dtype, denoised=True).denoising
    assert 0.85 * living.most < predicted < 1.2 * living.most


@pytest.mark.parametrize("batch", [1, 8])
def test_a_denoisers_pass_takes_what_is_predicted(batch: int) -> None:
    flow = build(STARFlowConfig(4, 8, 32, num_blocks=2, layers_per_block=1, head_dim=32, txt_size=4, txt_dim=16))
    denoiser = Denoiser(DenoiserConfig(**inputs_of(flow), channels=64, layers=(3,), head_dim=32))
    x, condition = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 16)
    with Living() as living:
        denoiser.clean(x, condition)
    predicted = CompanionShape(width=64).pass_bytes(batch * (64 + 4))
    assert 0.85 * living.most < predicted < 1.2 * living.most


class Living(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; the most at any time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[int, int] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self.seen:
            return
        self.seen[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self.seen.pop(key)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_the_peak_of_training_with_checkpoints_is_about_what_is_predicted(
    precision: memory.Precision, *, swiglu: bool
) -> None:
    config = STARFlowConfig(
        in_channels=4, img_size=8, channels=192, num_blocks=2, layers_per_block=(2, 8), txt_size=4, txt_dim=16,
        use_swiglu=swiglu, norm_type="rms_norm" if swiglu else "layer_norm",
    )  # fmt: skip
    model = build(config)
    checkpoint_activations(model, ParallelSettings(checkpoint_attention=True, checkpoint_mlp=True))
    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    x, condition = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 16)
    for parameter in model.parameters():  # what is measured is without gradients
        parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
    with Living() as living:
        with low:
            z, logdet = model(x, condition)
            loss = z.square().sum() - logdet.sum()
        kept = living.bytes
        loss.backward()
    predicted = memory.training_memory(config, 8, precision=precision, checkpointing=True)
    assert 0.9 * living.most < predicted.activations + predicted.gathered < 1.3 * living.most
    assert kept < predicted.activations < memory.training_memory(config, 8, precision=precision).activations / 4


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_training_keeps_is_about_what_is_predicted(precision: memory.Precision, *, swiglu: bool) -> None:
    config = STARFlowConfig(
        in_channels=4, img_size=8, channels=192, num_blocks=2, layers_per_block=(1, 3), txt_size=4, txt_dim=16,
        use_swiglu=swiglu, norm_type="rms_norm" if swiglu else "layer_norm",
    )  # fmt: skip
    model, sizes, kept = build(config), {}, []
    weights = {one.data_ptr() for one in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), low:
        model(torch.randn(8, 4, 8, 8), torch.randn(8, 4, 16))
    predicted = memory.training_memory(config, 8, precision=precision).activations
    held = sum(sizes.values())
    assert 0.8 * held < predicted < 1.4 * held


def test_sharding_divides_the_states_and_nothing_else() -> None:
    config = PRESETS["starflow-t2i-3b"].config
    whole = memory.training_memory(config, 8)
    for gpus, sharding, parts in ((8, "sharded", 8), (64, "sharded", 64), (64, "hybrid", 8), (64, "replicated", 1)):
        share = memory.training_memory(config, 8, gpus=gpus, sharding=sharding)  # type: ignore[arg-type]
        for name in ("parameters", "gradients", "moments", "average"):
            assert math.isclose(getattr(share, name) * parts, getattr(whole, name), rel_tol=1e-6)
        assert share.activations == whole.activations
    assert memory.training_memory(config, 8, checkpointing=True).activations < whole.activations / 5
    assert 3.8e9 < memory.parameter_count(config) < 3.9e9
    assert whole.peak == sum(vars(whole).values())


@DRAWN
@given(batch=st.integers(1, 64), guided=st.booleans())
def test_less_precision_and_smaller_tiles_take_less(batch: int, guided: bool) -> None:
    config, coder = PRESETS["starflow-t2i-3b"].config, memory.AUTOENCODERS["diffusers_kl"]

    def peak(**options: object) -> int:
        known = {"guided": guided, "autoencoder": coder}
        return memory.sampling_memory(config, batch, **known, **options).peak  # type: ignore[arg-type]

    assert peak(dtype="bfloat16", weights="int8") < peak(dtype="bfloat16") < peak(cache_dtype="bfloat16") < peak()
    assert peak(tile=16) <= peak()
    assert peak(dtype="bfloat16", weights="int8", offload=True) < peak(dtype="bfloat16", offload=True)
    assert peak(dtype="bfloat16", offload=True) < peak(dtype="bfloat16")


def test_the_released_model_fits_8_gb_of_a_gpu_with_int8_and_offload() -> None:
    """Of 8 GB a driver's context takes a part; a batch of one, guided, with its cache and sd-vae."""
    config, coder = PRESETS["starflow-t2i-3b"].config, memory.AUTOENCODERS["diffusers_kl"]
    whole = memory.sampling_memory(config, 1, dtype="bfloat16", autoencoder=coder)
    small = memory.sampling_memory(config, 1, dtype="bfloat16", weights="int8", offload=True, autoencoder=coder)
    assert whole.peak > 8e9
    assert small.peak < 6e9
    assert small.weights == max(memory.block_bytes(config, block, "bfloat16", "int8") for block in range(6))


def test_impossible_amounts_are_refused() -> None:
    config = PRESETS["tarflow-afhq-256"].config
    with pytest.raises(UserError, match="0 pictures of 1024 tokens: both must be at least 1"):
        memory.sampling_memory(config, 0)
    with pytest.raises(UserError, match="1 pictures on 0 GPUs"):
        memory.training_memory(config, 1, gpus=0)


@pytest.mark.parametrize("model", ["glyphs", "starflow-t2i-3b", "tarflow-afhq-256", RECIPE])
def test_info_predicts_before_anything_is_loaded(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model, "--memory", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in facts["sampling"]} == {
        "float32", "bfloat16", "int8", "int4", "bfloat16 offload", "int8 offload",
    }  # fmt: skip
    assert {row["gpus"] for row in facts["training"]} == {1, 8, 64}
    assert main(["info", model, "--memory"]) == 0
    assert f"{facts['parameters']:,} parameters" in capsys.readouterr().out
    assert main(["info", "nothing-here", "--memory"]) == 2


def test_networks_beside_a_flow_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))
    pipeline.save_pretrained(tmp_path / "alone")
    with_companions(pipeline)
    pipeline.config = dataclasses.replace(pipeline.config, cleaning="denoiser")
    pipeline.save_pretrained(tmp_path / "both")
    alone, both = (predict_memory(str(tmp_path / name)) for name in ("alone", "both"))
    assert pipeline.student is not None
    assert pipeline.denoiser is not None
    held = 4 * sum(one.numel() for network in (pipeline.student, pipeline.denoiser) for one in network.parameters())
    for before, now in zip(alone["sampling"], both["sampling"], strict=True):
        assert now["companions"] == held
        assert now["denoising"] == 4 * 11 * 16 * now["batch"] * (4 + 1)  # and not a Tweedie step's, as alone
        passes = max(now["activations"], now["denoising"], now["decoding"])
        assert now["peak"] == now["weights"] + now["cache"] + passes + held
        assert before["companions"] == 0
    assert main(["info", str(tmp_path / "both"), "--memory"]) == 0
    out = capsys.readouterr().out
    assert f"and {held / memory.GIB * 1024:.2f} MiB of student and denoiser" in out
    assert "passes: activations; with the denoiser those of its own pass" in out


def test_a_published_repository_is_known_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "apple/starflow", "--memory", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == memory.parameter_count(PRESETS["starflow-t2i-3b"].config)
    assert facts["text_encoder"] == "google/flan-t5-xl"
    assert {row["text_encoder"] for row in facts["sampling"]} == {2_447_054_848}
    assert facts["denoised"]
    assert main(["info", "apple/starflow", "--memory"]) == 0
    out = capsys.readouterr().out
    assert "2.84" in out, "autoencoder, decoding and text encoder"
    assert "released before pictures are drawn" in out
