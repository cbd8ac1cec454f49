"""Emoji are read by their names, anywhere in a prompt."""

from __future__ import annotations

import pytest

from starflow.conditioning.emoji import name_emoji


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("🍎", "red apple"),
        ("a 🍎 on a table", "a red apple on a table"),
        ("3D render of 🍎🍋!", "3D render of red apple lemon!"),
        ("big🍎red", "big red apple red"),
        ("❤️", "red heart"),
        ("❤", "red heart"),  # without U+FE0F
        ("👍🏽", "thumbs up"),  # skin tones make no difference
        ("👨‍👩‍👧", "family man, woman, girl"),  # the family, not its members
        ("🏳️‍🌈 (🌈)", "rainbow flag (rainbow)"),
        ("🇫🇷", "flag France"),
    ],
)
def test_emoji_become_names(prompt: str, read: str) -> None:
    assert name_emoji(prompt) == read


@pytest.mark.parametrize("prompt", ["", "a red apple", "  two  spaces ", "naïve, 12 × 3 #1 * – …", "苹果\n in a 1:1"])
def test_a_text_without_emoji_is_unchanged(prompt: str) -> None:
    assert name_emoji(prompt) == prompt
