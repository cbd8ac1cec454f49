"""A text encoder that is in memory only while it encodes: for one that is larger than what it is needed for.

flan-t5-xl's encoder takes 2.4 GB in bfloat16, and a picture needs it for less than a second. Prompts are encoded
together where they come together, and their states are remembered, so a null condition or a second batch of the same
prompts loads nothing.

A conditioner from its description, as config.json keeps it.
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
from starflow.conditioning.text import TextEncoder, encoder_width, find_text_encoder
from starflow.conditioning.token_embeddings import TokenEmbeddings
from starflow.errors import UserError
from starflow.io.hub import DEFAULT_HUB, HubOptions

BATCH_SIZE = 16
"""Prompts a pass of the encoder."""

CACHED_PROMPTS = 2048
"""Prompts whose states are kept, without their padding; of 20 tokens each and width 2048 that is 0.3 GB."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OnDemandTextEncoder:
    """A `TextEncoder` that is loaded when there is something to encode, and released after; see `Conditioner`.

    Its files are looked for, and fetched, at once. `network` holds no weights: it says where they will be put.
    """

    def __init__(self, spec: ConditionerSpec, hub: HubOptions = DEFAULT_HUB) -> None:
        """Of the encoder that `spec` describes.

        Raises:
            UserError: it is nowhere to be found, or has another width.
        """
        width = encoder_width(find_text_encoder(spec.source, fetch))
        if width != spec.dim:
            raise UserError(
                f"the text encoder '{spec.source}' has width {width}, the model expects {spec.dim}: use the one that "
                "the model was trained with"
            )
        self._spec, self._fetch = spec, fetch
        self.network: nn.Module = _DeviceMarker()
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def spec(self) -> ConditionerSpec:
        return self._spec

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """As `TextEncoder.encode`; loads the encoder for those that are not remembered."""
        found = self._recall(prompts)
        device = next(self.network.buffers()).device
        padded = [F.pad(found[prompt], (0, 0, 0, self._spec.size - len(found[prompt]))) for prompt in prompts]
        return torch.stack(padded).to(device)

    def null(self, batch: int) -> Tensor:
        """The encoding of the empty prompt, (batch, S, dim)."""
        return self.encode([""]).expand(batch, -1, -1)

    def load(self) -> TextEncoder:
        """The encoder itself, on the device that this one is on."""
        encoder = TextEncoder.from_pretrained(self._spec.source, self._spec.size, DTYPES[self._spec.dtype], self._fetch)
        encoder.network.to(next(self.network.buffers()).device)
        return encoder

    def save(self, folder: Path) -> None:
        """See `TextEncoder.save`."""
        self.load().save(folder)
        _free_memory(next(self.network.buffers()).device)

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts together that are going to be asked for apart."""
        self._recall(list(dict.fromkeys(prompts))[:CACHED_PROMPTS])

    def _recall(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of prompts, without padding, on the CPU."""
        wanted = list(dict.fromkeys(prompts))
        new = [prompt for prompt in wanted if prompt not in self._known]
        if new:
            self._learn(new if "" in self._known or "" in new else [*new, ""])
        found = {prompt: self._known[prompt] for prompt in wanted}
        for prompt in wanted:
            self._known.move_to_end(prompt)
        while len(self._known) > CACHED_PROMPTS:
            self._known.popitem(last=False)
        return found

    def _learn(self, prompts: Sequence[str]) -> None:
        """Encode prompts and remember them; with any others the empty one, which guidance needs."""
        encoder = self.load()
        for start in range(0, len(prompts), BATCH_SIZE):
            some = prompts[start : start + BATCH_SIZE]
            for prompt, states in zip(some, encoder.encode(some).cpu(), strict=True):
                used = int(states.abs().sum(-1).nonzero().max()) + 1
                self._known[prompt] = states[:used].clone()
        del encoder
        _free_memory(next(self.network.buffers()).device)


class _DeviceMarker(nn.Module):
    """Stands for the weights, and is moved as they would be."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)


def _free_memory(device: torch.device) -> None:
    """Give memory back that nothing holds any more; transformers' models have cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


LARGE_BYTES = 10**9
"""Bytes of a text encoder's files from which on it is released after use."""


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
        found = TokenEmbeddings.from_pretrained(spec.source, spec.size, fetch)
    elif keep or (keep is None and _file_bytes(spec.source, fetch) < LARGE_BYTES):
        found = TextEncoder.from_pretrained(spec.source, spec.size, DTYPES[spec.dtype], fetch)
    else:
        found = OnDemandTextEncoder(spec, hub)
    if (found.spec.size, found.spec.dim) != (spec.size, spec.dim):
        raise UserError(
            f"the conditioner '{spec.source or spec.kind}' gives {found.spec.size} tokens of width {found.spec.dim}, "
            f"the model expects {spec.size} of width {spec.dim}: use the one that the model was trained with"
        )
    return found


def _file_bytes(source: str, fetch: HubOptions) -> int:
    return sum(path.stat().st_size for path in find_text_encoder(source, fetch).glob("*.safetensors"))
