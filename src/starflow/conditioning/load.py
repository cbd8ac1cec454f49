"""A conditioner from its description, as config.json keeps it."""

from __future__ import annotations

from starflow.conditioning.base import Conditioner, ConditionerSpec
from starflow.conditioning.classes import ClassLabels
from starflow.conditioning.text import TextEncoder
from starflow.conditioning.tokens import TokenEmbeddings
from starflow.errors import UserError


def load_conditioner(spec: ConditionerSpec) -> Conditioner:
    """Build the conditioner that `spec` describes, on the CPU in float32.

    Raises:
        UserError: the text encoder cannot be found or read, or what was found has another width.
    """
    if spec.kind == "class":
        found: Conditioner = ClassLabels(spec.names)
    elif spec.kind == "embeddings":
        found = TokenEmbeddings.from_pretrained(spec.source, spec.size)
    else:
        found = TextEncoder.from_pretrained(spec.source, spec.size)
    if (found.spec.size, found.spec.dim) != (spec.size, spec.dim):
        raise UserError(
            f"the conditioner '{spec.source or spec.kind}' gives {found.spec.size} tokens of width {found.spec.dim}, "
            f"the model expects {spec.size} of width {spec.dim}: use the one that the model was trained with"
        )
    return found
