"""Conversion to our layout: of a published checkpoint's flow, and of a Gemma-style language model to a deep block.

The published releases that are known by name are listed here.

Contract: the checkpoint is mapped and never read as a whole, and what is written goes to the disk a shard at a time:
the memory needed is that of a shard and a tensor. Keys, shapes and options are compared, and room on the disk is looked
for, before anything is written.

The options of a release are its published configuration's (STARFlow, arXiv 2506.06276); the repository itself does not
hold them.

The paper initialises a deep block from Gemma (STARFlow, arXiv 2506.06276). The layers of Gemma 1, 2 and 3 are those of
a block with RMSNorm (weight 1 + w), gated tanh-GELU MLPs, grouped heads and half-split rotary pairs; Gemma 2 and 3 add
norms after attention and MLP, Gemma 3 norms of queries and keys. A query scale other than 1/sqrt(head_dim) is folded
into the weights. Text comes as the model's own token embeddings (`starflow.conditioning.TokenEmbeddings`). What a
flow's block has no place for is left out: soft caps of logits (Gemma 2), windows shorter than the sequence, and
position scales; positions are the flow's own.

Only config.json and safetensors are read; nothing of transformers is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.io import files
from starflow.nn.cpu import drop_file_pages
from starflow.published.checkpoint import OpenCheckpoint, check_finite

SHARD_BYTES = 2**30
"""Bytes that a shard stays under; it waits in memory until it is full."""

ByteProgress = Callable[[int, int], None]

"""A callback that is told the bytes written so far and in all."""


def no_progress(_done: int, _total: int) -> None:
    """Take no notice of the progress."""


def convert_flow(
    opened: OpenCheckpoint,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: ByteProgress = no_progress,
) -> int:
    """Write a checkpoint's flow to a folder that `from_pretrained` reads; returns the bytes of its weights.

    Args:
        opened: the checkpoint, from `open_published`.
        folder: made where it is missing.
        dtype: of the written weights.
        shard_bytes: size that a file stays under.
        progress: told the bytes written so far and in all.

    Raises:
        UserError: the folder cannot be written, or the disk has no room.
    """
    total = sum(tensor.numel() * dtype.itemsize for tensor in opened.tensors.values())
    files.check_disk_space(folder, total + total // 100, f"{opened.name} in {str(dtype).removeprefix('torch.')}")
    checkpoint.save(folder, opened.config, _cast(opened, dtype, total, progress), shard_bytes)
    return total


def _cast(
    opened: OpenCheckpoint, dtype: torch.dtype, total: int, progress: ByteProgress
) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, tensor in opened.tensors.items():
        check_finite(name, tensor, opened.name)
        yield name, tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if opened.mapped and name not in opened.filled:
            drop_file_pages(tensor)
        done += tensor.numel() * dtype.itemsize
        progress(done, total)


@dataclass(frozen=True)
class PublishedRelease:
    """A published checkpoint in a repository of the hub, in its authors' layout."""

    file: str
    """Its name in the repository."""
    options: Mapping[str, Any]
    """The options that `load_published` takes."""
    terms: str
    """A phrase that says what its licence allows."""
    preset: str = ""
    """Name of its architecture among `starflow.flow.config.PRESETS`."""


def _arguments(**values: Any) -> dict[str, Any]:
    """Options in the YAML dialect."""
    return {"arguments": [{key: value} for key, value in values.items()]}


RELEASES: dict[str, PublishedRelease] = {
    "apple/starflow": PublishedRelease(
        "starflow_3B_t2i_256x256.pth",
        _arguments(
            img_size=256,
            channel_size=4,
            patch_size=1,
            channels=3072,
            blocks=6,
            layers_per_block="2 2 2 2 2 24",
            txt_size=128,
            rope=1,
            sos=1,
            nvp=1,
            use_softplus=1,
            cond_top_only=1,
            use_final_norm=1,
            adaln=0,
            seq_order="L2R",
            soft_clip=4,
            noise_std=0.3,
            vae="stabilityai/sd-vae-ft-ema",
            text="google/flan-t5-xl",
            cfg=2.5,
        ),
        "for research only",
        "starflow-t2i-3b",
    ),
}

"""The known releases by repository.

>>> RELEASES["apple/starflow"].preset
'starflow-t2i-3b'
"""


MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
"""Values of `model_type` in the config.json of the models that can be read."""

GEMMA_FILES = ("*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
"""Files to download of such a model, besides config.json."""

SHALLOW_LAYERS = (2, 2, 2, 2, 2)
"""Layers of the blocks before the deep one, whose weights start at random."""


def is_gemma(folder: Path) -> bool:
    """Whether a folder holds a Gemma-style language model, by its config.json."""
    path = folder / "config.json"
    return path.is_file() and files.read_json(path).get("model_type") in MODEL_TYPES


def gemma_options(folder: Path, layers: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The options of a flow whose deep block is the language model.

    Args:
        folder: of the language model, as the hub has it.
        layers: of each block, the deep one last; None is `SHALLOW_LAYERS` and all layers of the language model.

    Raises:
        UserError: a model of another kind, or fewer layers than asked for.
    """
    config = _config(folder)
    layers = layers or (*SHALLOW_LAYERS, int(config["num_hidden_layers"]))
    if layers[-1] > config["num_hidden_layers"]:
        raise UserError(
            f"flow.layers_per_block asks for {layers[-1]} deep layers, but {folder} has {config['num_hidden_layers']}"
        )
    return {
        "kind": "starflow",
        "channels": config["hidden_size"],
        "num_blocks": len(layers),
        "layers_per_block": list(layers),
        "head_dim": config["head_dim"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "mlp_hidden": [config["intermediate_size"]] * len(layers),
        "norm_type": "rms_norm",
        "use_swiglu": True,
        "use_qk_norm": config["model_type"].startswith("gemma3"),
        "use_post_norm": config["model_type"] != "gemma",
        "use_bias": False,
        "hf_style_rope": True,
        "use_final_norm": True,
    }


def gemma_tensors(folder: Path, block: int, layers: int) -> dict[str, Tensor]:
    """The weights of block `block` of a flow: the first `layers` layers, the final norm, an identity for the text.

    Raises:
        UserError: missing or damaged files, or weights that are missing.
    """
    config, tensors = _config(folder), _layer_tensors(folder)
    mapped = {"final_norm.weight": _take(tensors, "norm.weight", folder)}
    for layer in range(layers):
        for name, tensor in _layer(config, tensors, layer, folder).items():
            mapped[f"attn_blocks.{layer}.{name}"] = tensor
    width = config["hidden_size"]  # the block then reads text as the language model does
    mapped["proj_txt.weight"] = torch.eye(width, dtype=torch.float32, device="cpu")
    mapped["proj_txt.bias"] = torch.zeros(width, dtype=torch.float32, device="cpu")
    return {f"blocks.{block}.{name}": tensor for name, tensor in mapped.items()}


def _config(folder: Path) -> dict[str, Any]:
    """The config of the text model, completed by its defaults."""
    values: dict[str, Any] = files.read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{folder} holds a '{kind}', expected a Gemma-style language model ({', '.join(MODEL_TYPES)})")
    values = {**values, **values.get("text_config", {}), "model_type": kind}
    values.setdefault("head_dim", 256)
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if values.get("rms_norm_eps", 1e-6) != 1e-6 or values.get("attention_bias"):
        raise UserError(f"{folder} has biases in its attention or another eps than 1e-6, which no block of a flow has")
    return values


def _layer(config: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: int, folder: Path) -> dict[str, Tensor]:
    """The weights of one layer under the names of a flow's."""

    def take(name: str) -> Tensor:
        return _take(tensors, f"layers.{layer}.{name}", folder)

    scale = math.sqrt(config["head_dim"] / config.get("query_pre_attn_scalar", config["head_dim"]))
    query = take("self_attn.q_proj.weight")
    gemma3, first = config["model_type"].startswith("gemma3"), config["model_type"] == "gemma"
    if not gemma3:
        query = query * scale
    mapped = {
        "attention.norm.weight": take("input_layernorm.weight"),
        "attention.qkv.weight": torch.cat((query, take("self_attn.k_proj.weight"), take("self_attn.v_proj.weight"))),
        "attention.proj.weight": take("self_attn.o_proj.weight"),
        "mlp.norm.weight": take(f"{'post_attention' if first else 'pre_feedforward'}_layernorm.weight"),
        **{f"mlp.{name}_proj.weight": take(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")},
    }
    if not first:
        mapped["attention.post_norm.weight"] = take("post_attention_layernorm.weight")
        mapped["mlp.post_norm.weight"] = take("post_feedforward_layernorm.weight")
    if gemma3:
        mapped["attention.query_norm.weight"] = scale * (1 + take("self_attn.q_norm.weight").float()) - 1
        mapped["attention.key_norm.weight"] = take("self_attn.k_norm.weight")
    return mapped


def _take(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder} lacks the weight '{name}': fetch the model again")
    return tensors[name]


def _layer_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of the layers and the final norm, by their names within the text model."""
    found = {}
    for name, tensor in _tensors(folder, re.compile(r"(?!.*vision).*\b(layers\.\d+\..+|norm\.weight)")):
        inside = re.search(r"(?:^|\.)(layers\.\d+\..+|norm\.weight)$", name)
        if inside:
            found[inside[1]] = tensor
    return found


def _tensors(folder: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all safetensors files of a folder whose whole name matches."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no safetensors files: fetch the model again")
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    if wanted.fullmatch(name):
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
