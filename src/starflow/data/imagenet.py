"""ImageNet's folders as they come: one a synset (n01440764/...), readable where the mapping file lies near them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt")
_LINE = re.compile(r"(n\d{8})\s+(\S.*)")
_SEARCHED = 4
"""The folder itself and so many above: the mapping lies beside ILSVRC/, the pictures in ILSVRC/Data/CLS-LOC/train."""


def synset_names(folder: Path) -> dict[str, str]:
    """Readable names of synset ids, in the ids' order; empty where no mapping file lies in or above the folder.

    A name is the synset's first word; two synsets of the same first word ("crane") are told apart by their others, or
    by their ids.
    """
    absolute = folder.absolute()
    places = [absolute, *absolute.parents][:_SEARCHED]
    found = next((place / name for place in places for name in MAPPINGS if (place / name).is_file()), None)
    if found is None:
        return {}
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines()
    words = {match[1]: match[2].strip() for line in lines if (match := _LINE.fullmatch(line.strip()))}
    first = {synset: text.split(",")[0].strip() for synset, text in words.items()}
    shared = {name for name, count in Counter(name.casefold() for name in first.values()).items() if count > 1}
    named = {synset: words[synset] if name.casefold() in shared else name for synset, name in first.items()}
    twice = {name for name, count in Counter(name.casefold() for name in named.values()).items() if count > 1}
    return {
        synset: f"{name} ({synset})" if name.casefold() in twice else name for synset, name in sorted(named.items())
    }


def order_classes(labels: Iterable[str], names: dict[str, str]) -> list[str]:
    """Class names in order: of the synsets where all are ImageNet's, by number where all are numbers, else by name."""
    found = set(labels)
    if names and found <= set(names.values()):
        return [name for name in names.values() if name in found]
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)
