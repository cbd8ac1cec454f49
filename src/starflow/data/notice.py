"""The notice that goes beside the glyph set and beside every weight trained on it."""

from __future__ import annotations

from starflow.data.registry import Sources

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE
USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

LICENCE_URLS = {
    "MIT": "the text below",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
}


def notice_text(sources: Sources) -> str:
    """Names every source with its copyright and licence, and reproduces the MIT text.

    The pictures were rendered, resized, placed on backgrounds and recoloured: CC BY 4.0 asks to say so.
    """
    lines = ["The pictures of the glyph set, and their captions, come from these packages of the npm registry:", ""]
    for package in sources.all():
        lines.append(f"* {package.name} {package.version}: {package.art.rstrip('.')}.")
        lines.append(f"  Licence: {package.licence} ({LICENCE_URLS[package.licence]}).")
    lines += [
        "",
        "Changes made: drawings were rendered to pixels, resized, placed on flat backgrounds, mirrored, shifted",
        "and recoloured; captions were composed from names and tags.",
        "",
        "The MIT licence:",
        "",
        MIT,
    ]
    return "\n".join(lines)
