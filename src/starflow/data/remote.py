"""Files by URL: read from end to end, or a range of bytes at a time. http and https only; nothing is run."""

from __future__ import annotations

import re
import time
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from starflow.errors import UserError

TIMEOUT = 60.0
TRIES = 4
PARTIAL = 206
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(path: str) -> bool:
    """Whether a path is an address on the network.

    Raises:
        UserError: an address of another kind (`pipe:`, `s3:`, ...).
    """
    found = _SCHEME.match(path)
    if not found or (len(found[1]) == 1):  # a drive letter of Windows
        return False
    if found[1].lower() not in ("http", "https"):
        raise UserError(f"'{path}': {found[1]}: is not read, expected http: or https:, or files (mount or copy them)")
    return True


def expand(pattern: str) -> list[str]:
    """`a-{000..002}.tar` as a-000.tar, a-001.tar, a-002.tar; several ranges multiply.

    Raises:
        UserError: a range that runs backwards.
    """
    found = _RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise UserError(f"'{pattern}': {found[0]} runs backwards; write the smaller number first")
    numbers = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    return [name for number in numbers for name in expand(pattern[: found.start()] + number + pattern[found.end() :])]


def open_url(url: str) -> IO[bytes]:
    """The whole file as a stream.

    Raises:
        OSError: it cannot be had.
    """
    stream: IO[bytes] = urlopen(Request(url), timeout=TIMEOUT)
    return stream


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`, tried again where the network fails for a moment.

    Raises:
        OSError: it cannot be had, or the server gives no ranges.
    """
    request = Request(url, headers={"Range": f"bytes={start}-{start + size - 1}"})
    failure: OSError = OSError("no answer")
    for turn in range(TRIES):
        if turn:
            time.sleep(0.5 * 2 ** (turn - 1))
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status != PARTIAL:
                    raise OSError(f"{url}: the server gives no ranges of bytes, so copy the file")
                data: bytes = answer.read()
        except HTTPError as error:
            if error.code < 500:
                raise OSError(f"{url}: {error}") from None
            failure = OSError(f"{url}: {error}")
        except (URLError, TimeoutError, ConnectionError) as error:
            failure = OSError(f"{url}: {error}")
        else:
            if len(data) == size:
                return data
            failure = OSError(f"{url}: {len(data)} bytes came of {size}")
    raise failure
