"""Condition tokens from prompts: class labels, text encoders by transformers, and token embeddings."""

from starflow.conditioning.base import Conditioner, ConditionerSpec
from starflow.conditioning.classes import ClassLabels
from starflow.conditioning.emoji import name_emoji
from starflow.conditioning.load import load_conditioner
from starflow.conditioning.text import MINILM, TextEncoder
from starflow.conditioning.tokens import TokenEmbeddings

__all__ = [
    "MINILM",
    "ClassLabels",
    "Conditioner",
    "ConditionerSpec",
    "TextEncoder",
    "TokenEmbeddings",
    "load_conditioner",
    "name_emoji",
]
