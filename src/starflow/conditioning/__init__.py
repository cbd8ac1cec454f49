"""Condition tokens from prompts: class labels, text encoders by transformers, and token embeddings.

They are loaded by their description, as config.json keeps it; large text encoders only while they encode.
flan-t5-xl's encoder takes 2.4 GB in bfloat16, and an image needs it for less than a second. `OnDemandTextEncoder`
encodes prompts together where they come together, and caches their states, so a null condition or a second batch of
the same prompts loads nothing.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.conditioning.base import ClassLabels, Conditioner, ConditionerSpec
from starflow.conditioning.text import (
    MINILM,
    TextEncoder,
    TokenEmbeddings,
    encoder_width,
    find_text_encoder,
    name_emoji,
)
from starflow.errors import UserError
from starflow.io.hub import DEFAULT_HUB, HubOptions

__all__ = [
    "MINILM",
    "ClassLabels",
    "Conditioner",
    "ConditionerSpec",
    "OnDemandTextEncoder",
    "TextEncoder",
    "TokenEmbeddings",
    "load_conditioner",
    "name_emoji",
]

BATCH_SIZE = 16
"""Prompts that the encoder reads at once."""

CACHED_PROMPTS = 2048
"""Prompts whose states are cached, without their padding; of 20 tokens each and width 2048 that is 0.3 GB."""

LARGE_BYTES = 10**9
"""Size of a text encoder's files from which on it is loaded only while it encodes."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_conditioner(spec: ConditionerSpec, hub: HubOptions = DEFAULT_HUB, keep: bool | None = True) -> Conditioner:
    """Build the conditioner that `spec` describes, on the CPU.

    Args:
        spec: as config.json has it.
        hub: the hub's revision, cache and whether to ask the network.
        keep: whether a text encoder stays in memory between uses; None keeps one whose files take under a gigabyte.

    Raises:
        UserError: the text encoder cannot be found or read, or what was found has another width.
    """
    if spec.kind == "class":
        found: Conditioner = ClassLabels(spec.names)
    elif spec.kind == "embeddings":
        found = TokenEmbeddings.from_pretrained(spec.source, spec.size, hub)
    elif keep or (keep is None and _file_bytes(spec.source, hub) < LARGE_BYTES):
        found = TextEncoder.from_pretrained(spec.source, spec.size, DTYPES[spec.dtype], hub)
    else:
        found = OnDemandTextEncoder(spec, hub)
    if (found.spec.size, found.spec.dim) != (spec.size, spec.dim):
        raise UserError(
            f"the conditioner '{spec.source or spec.kind}' gives {found.spec.size} tokens of width {found.spec.dim}, "
            f"the model expects {spec.size} of width {spec.dim}: use the one that the model was trained with"
        )
    return found


class OnDemandTextEncoder:
    """The `Conditioner` over a `TextEncoder` that is in memory only while it encodes.

    Its files are looked for, and fetched, at once. `network` holds no weights: its device is where they will be put.
    """

    def __init__(self, spec: ConditionerSpec, hub: HubOptions = DEFAULT_HUB) -> None:
        """Find the files of the encoder that `spec` describes.

        Raises:
            UserError: it is nowhere to be found, or has another width.
        """
        width = encoder_width(find_text_encoder(spec.source, hub))
        if width != spec.dim:
            raise UserError(
                f"the text encoder '{spec.source}' has width {width}, the model expects {spec.dim}: use the one that "
                "the model was trained with"
            )
        self._spec, self._hub = spec, hub
        self.network: nn.Module = _DeviceMarker()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def spec(self) -> ConditionerSpec:
        """See `Conditioner.spec`."""
        return self._spec

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts as `TextEncoder.encode` does; the encoder is loaded for those that are not cached."""
        found = self._states(prompts)
        device = next(self.network.buffers()).device
        padded = [F.pad(found[prompt], (0, 0, 0, self._spec.size - len(found[prompt]))) for prompt in prompts]
        return torch.stack(padded).to(device)

    def null(self, batch: int) -> Tensor:
        """Encode the empty prompt, (batch, S, dim)."""
        return self.encode([""]).expand(batch, -1, -1)

    def load(self) -> TextEncoder:
        """Load the encoder itself, on the device of `network`."""
        encoder = TextEncoder.from_pretrained(self._spec.source, self._spec.size, DTYPES[self._spec.dtype], self._hub)
        encoder.network.to(next(self.network.buffers()).device)
        return encoder

    def save(self, folder: Path) -> None:
        """See `TextEncoder.save`."""
        self.load().save(folder)
        _free_memory(next(self.network.buffers()).device)

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode prompts together whose conditions will be asked for one batch at a time."""
        self._states(list(dict.fromkeys(prompts))[:CACHED_PROMPTS])

    def _states(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of prompts, without padding, on the CPU: from the cache, or encoded now."""
        wanted = list(dict.fromkeys(prompts))
        new = [prompt for prompt in wanted if prompt not in self._cache]
        if new:  # with any others the empty prompt, which guidance needs
            self._encode_and_cache(new if "" in self._cache or "" in new else [*new, ""])
        found = {prompt: self._cache[prompt] for prompt in wanted}
        for prompt in wanted:
            self._cache.move_to_end(prompt)
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return found

    def _encode_and_cache(self, prompts: Sequence[str]) -> None:
        """Load the encoder, encode prompts, cache their states, and drop the encoder."""
        encoder = self.load()
        for start in range(0, len(prompts), BATCH_SIZE):
            some = prompts[start : start + BATCH_SIZE]
            for prompt, states in zip(some, encoder.encode(some).cpu(), strict=True):
                used = int(states.abs().sum(-1).nonzero().max()) + 1
                self._cache[prompt] = states[:used].clone()
        del encoder
        _free_memory(next(self.network.buffers()).device)


class _DeviceMarker(nn.Module):
    """Stands for weights that are not there: its device is where they will be put."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0, dtype=torch.float32, device="cpu"), persistent=False)


def _free_memory(device: torch.device) -> None:
    """Return memory that nothing holds any more to the device; transformers' models have cycles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _file_bytes(source: str, hub: HubOptions) -> int:
    return sum(path.stat().st_size for path in find_text_encoder(source, hub).glob("*.safetensors"))
