"""A language model's token embeddings as conditions, for a flow whose deep block is that model (arXiv 2506.06276).

The condition is what the model's first layer would read: the embeddings of the caption's tokens, times sqrt(width) as
Gemma scales them, cut or padded to S tokens with zero vectors. Only the tokenizer and that one table are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.conditioning.base import ConditionerSpec
from starflow.conditioning.text import fit_prompts
from starflow.errors import UserError
from starflow.io.hub import DEFAULT_HUB, HubOptions, local_or_hub

MODEL_FILES = ("config.json", "*.safetensors")

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.safetensors.index.json")

_TABLE_NAME = re.compile(r"(.*\.)?embed_tokens\.weight")


class TokenEmbeddings:
    """The `Conditioner` over a language model's token embeddings. A blank prompt is the null condition."""

    def __init__(self, table: Tensor, tokenizer: Any, size: int, source: str = "") -> None:
        """Wrap a table of embeddings and its tokenizer.

        Args:
            table: (vocabulary, width), already scaled.
            tokenizer: the model's own, of transformers.
            size: S, condition tokens.
            source: where the two came from, for config.json.
        """
        self._spec = ConditionerSpec("embeddings", size, table.shape[1], source)
        self._tokenizer = tokenizer
        self.network: nn.Module = nn.Embedding.from_pretrained(table)

    @classmethod
    def from_pretrained(cls, source: str, size: int = 128, hub: HubOptions = DEFAULT_HUB) -> TokenEmbeddings:
        """Load tokenizer and embeddings from a folder or the hub.

        Raises:
            UserError: nothing there, or no tokenizer or table in it.
        """
        from transformers import AutoTokenizer

        folder = local_or_hub(source, MODEL_FILES, TOKENIZER_FILES, hub=hub)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"'{source}' has no tokenizer that transformers can read: {reason}") from None
        table = read_embedding_table(folder)
        if len(tokenizer) > len(table):
            raise UserError(f"'{source}' has {len(tokenizer)} tokens and {len(table)} embeddings: fetch it again")
        return cls(table, tokenizer, size, source)

    @property
    def spec(self) -> ConditionerSpec:
        """See `Conditioner.spec`."""
        return self._spec

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to (B, S, width), float32, zeros where a prompt has ended."""
        rows = []
        device = next(self.network.parameters()).device
        for prompt in fit_prompts([one if one.strip() else "" for one in prompts], self._tokenizer, self._spec.size):
            ids = self._tokenizer(prompt, truncation=True, max_length=self._spec.size)
            states = self.network(torch.tensor(ids["input_ids"], dtype=torch.long, device=device)).float()
            rows.append(F.pad(states, (0, 0, 0, self._spec.size - len(states))))
        return torch.stack(rows)

    def null(self, batch: int) -> Tensor:
        """Encode the empty prompt, (batch, S, width)."""
        return self.encode([""]).expand(batch, -1, -1)


def read_embedding_table(folder: Path) -> Tensor:
    """Read token embeddings (vocabulary, width), scaled as the model's layers read them, in the files' precision.

    Raises:
        UserError: missing or damaged files.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    if _TABLE_NAME.fullmatch(name):
                        table: Tensor = file.get_tensor(name)
                        # As Gemma does it: the factor is rounded to the table's precision first.
                        return table * torch.tensor(math.sqrt(table.shape[1]), dtype=table.dtype, device=table.device)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
    raise UserError(f"{folder} holds no token embeddings (embed_tokens.weight): fetch the model again")
