"""The summary of a set: exact counts, the first names, a line for each thing that is odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.data.sources.captions import SetSummary, describe_set

IMAGES = st.fixed_dictionaries(
    {"name": st.just("a.png"), "caption": st.sampled_from(["", " ", "a cat"]), "label": st.sampled_from([None, "cat"])},
    optional={"note": st.just("images with several captions")},
)
LINES = st.lists(
    IMAGES
    | st.fixed_dictionaries({"skipped": st.just("b.png"), "reason": st.just("broken")})
    | st.fixed_dictionaries({"unused": st.just("c.heic"), "reason": st.sampled_from(["hidden files", "others"])})
)


@settings(max_examples=60, derandomize=True)
@given(LINES)
def test_every_line_is_counted_once(lines: list[dict[str, Any]]) -> None:
    summary = SetSummary()
    for line in lines:
        summary.add(line)
    info = summary.to_json()
    assert info["pictures"] + info["skipped"] + sum(count for count, _ in info["unused"].values()) == len(lines)
    assert info["captioned"] == sum(line.get("caption") == "a cat" for line in lines)
    assert info["labelled"] == sum(line.get("label") == "cat" for line in lines)
    assert sum(count for count, _ in info["notes"].values()) == sum("note" in line for line in lines)


def test_what_is_said() -> None:
    summary = SetSummary()
    for number in range(71):
        caption = "a cat" if number < 2 else ""
        summary.add({"name": f"{number}.png", "caption": caption, "label": "cat" if number else None, "note": ""})
    summary.add({"skipped": "x.png", "reason": "no known image format"})
    for name in ("a.heic", "b.heic"):
        summary.add({"unused": name, "reason": "files ending in .heic"})
    assert summary.first_reason == ", the first: x.png: no known image format"
    assert describe_set({**summary.to_json(), "heldout": 4}, Path("skipped.jsonl")) == [
        "pictures: 71, 4 of them held out, 2 with and 69 without a caption, 1 classes; 1 skipped, 2 other files and "
        "rows not used (skipped.jsonl)",
        "warning: 69 of 71 pictures have no caption: 2.png, 3.png, 4.png, ...",
        "warning: 1 of 71 pictures have no class",
        "not used: 2 files ending in .heic: a.heic, ...",
    ]
