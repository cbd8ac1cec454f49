"""ImageNet's folders as they come: one a synset (n01440764/...), readable where the mapping file lies near them.

The names are ImageNet's own and not shipped: `LOC_synset_mapping.txt` comes with the pictures, `words.txt` with the
development kit. Without either, the classes are called by their synset ids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
_SYNSET = re.compile(r"n\d{8}")
_LINE = re.compile(r"(n\d{8})\s+(\S.*)")
_ABOVE = 4
"""Folders above that are searched: the mapping lies beside ILSVRC/, the pictures in ILSVRC/Data/CLS-LOC/train."""


def synset_names(folder: Path, labels: Iterable[str]) -> dict[str, str]:
    """Readable names of synset ids, in the ids' order; empty where the labels are none, or no mapping file is near.

    A name is the synset's first word; two synsets of the same first word ("crane") are told apart by their others, or
    by their ids.
    """
    synsets = sorted(set(labels))
    if not synsets or not all(_SYNSET.fullmatch(label) for label in synsets):
        return {}
    absolute = folder.absolute()
    places = [absolute, *absolute.parents][: _ABOVE + 1]
    found = next((place / name for place in places for name in MAPPINGS if (place / name).is_file()), None)
    if found is None:
        return {}
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {match[1]: match[2].strip() for line in lines if (match := _LINE.fullmatch(line.strip()))}
    words = {synset: listed.get(synset, synset) for synset in synsets}
    first = {synset: text.split(",")[0].strip() for synset, text in words.items()}
    named = {synset: words[synset] if name in _shared(first) else name for synset, name in first.items()}
    twice = _shared(named)
    return {synset: f"{name} ({synset})" if name in twice else name for synset, name in named.items()}


def _shared(names: dict[str, str]) -> set[str]:
    """Names that several have, whatever their case."""
    counts = Counter(name.casefold() for name in names.values())
    return {name for name in names.values() if counts[name.casefold()] > 1}


def order_classes(labels: Iterable[str]) -> list[str]:
    """Class labels in order: by number where all are numbers, else by name (of synsets, ImageNet's own order)."""
    found = set(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)
