"""Condition tokens from prompts: class labels, text encoders by transformers, and token embeddings."""

from starflow.conditioning.base import ClassLabels, Conditioner, ConditionerSpec
from starflow.conditioning.load import OnDemandTextEncoder, load_conditioner
from starflow.conditioning.text import MINILM, TextEncoder, TokenEmbeddings, name_emoji

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
