"""Emoji in a prompt are read by their names: "a 🍎 on a table" is "a red apple on a table".

The names are those of Unicode's CLDR, by unicode-emoji-json 0.9.0 (MIT, see NOTICE), kept in
emoji_names.json without U+FE0F. Text encoders such as MiniLM know no emoji, so each would be an unknown token.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources

_IGNORED = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")  # text or picture style, and skin tones


def name_emoji(prompt: str) -> str:
    """`prompt` with every emoji replaced by its name, set apart from the words around it by spaces.

    Variation selectors and skin tones make no difference. A text without emoji comes back unchanged.
    """
    names, pattern = _table()
    if not pattern.search(prompt):
        return prompt
    named = pattern.sub(lambda found: f" {names[found[0]]} ", _IGNORED.sub("", prompt))
    return re.sub(r" +(?=[.,;:!?)\]])|(?<=[(\[]) +", "", re.sub(r" {2,}", " ", named)).strip()


@cache
def _table() -> tuple[dict[str, str], re.Pattern[str]]:
    """Names by emoji, and a pattern that prefers the longest (a family before its members)."""
    text = resources.files(__package__).joinpath("emoji_names.json").read_text(encoding="utf-8")
    names: dict[str, str] = json.loads(text)["names"]
    longest_first = sorted(names, key=len, reverse=True)
    return names, re.compile("|".join(map(re.escape, longest_first)))
