"""A conditioner from its description, as config.json keeps it."""

from __future__ import annotations

from starflow.conditioning.base import Conditioner, ConditionerSpec
from starflow.conditioning.classes import ClassLabels
from starflow.conditioning.released import DTYPES, ReleasedText
from starflow.conditioning.text import TextEncoder, resolve
from starflow.conditioning.tokens import TokenEmbeddings
from starflow.errors import UserError
from starflow.hub import HERE, Fetch

LARGE = 10**9
"""Bytes of a text encoder's files from which on it is released after use."""


def load_conditioner(spec: ConditionerSpec, fetch: Fetch = HERE, keep: bool | None = True) -> Conditioner:
    """Build the conditioner that `spec` describes, on the CPU.

    Args:
        spec: as config.json has it.
        fetch: the hub's revision, cache and whether to ask the network.
        keep: whether a text encoder stays in memory between uses; None keeps one whose files take under a gigabyte.

    Raises:
        UserError: the text encoder cannot be found or read, or what was found has another width.
    """
    if spec.kind == "class":
        found: Conditioner = ClassLabels(spec.names)
    elif spec.kind == "embeddings":
        found = TokenEmbeddings.from_pretrained(spec.source, spec.size, fetch)
    elif keep or (keep is None and _bytes(spec.source, fetch) < LARGE):
        found = TextEncoder.from_pretrained(spec.source, spec.size, DTYPES[spec.dtype], fetch)
    else:
        found = ReleasedText(spec, fetch)
    if (found.spec.size, found.spec.dim) != (spec.size, spec.dim):
        raise UserError(
            f"the conditioner '{spec.source or spec.kind}' gives {found.spec.size} tokens of width {found.spec.dim}, "
            f"the model expects {spec.size} of width {spec.dim}: use the one that the model was trained with"
        )
    return found


def _bytes(source: str, fetch: Fetch) -> int:
    return sum(path.stat().st_size for path in resolve(source, fetch).glob("*.safetensors"))
