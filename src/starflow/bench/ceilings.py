"""What this machine can do at most, measured now: bytes a second of a large read, operations a second of a product.

Contract: the read is of far more memory than any cache holds, the product large enough to run at its best; both run in
torch on the threads that everything else has. They are ceilings of a kind of work, not of the hardware: weights that
stay in a processor's cache are read faster than any large read, and a kernel may beat torch's own product.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from starflow.sampling.timing import wait
from starflow.train.flops import Product

READ_BYTES = {"cpu": 2**30}
"""Of the large read; elsewhere `READ_ELSEWHERE`."""
READ_ELSEWHERE = 2**32
RUNS = 5


@dataclass(frozen=True)
class Ceilings:
    """The two rates that no sampling in this precision is expected to pass."""

    bytes_per_second: float
    flops_per_second: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each: whatever else the machine does can only lower them."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )

    def seconds(self, moved: float, operations: float) -> tuple[float, float]:
        """What reading so many bytes and computing so many operations take at least."""
        return moved / self.bytes_per_second, operations / self.flops_per_second


def measure_ceilings(device: torch.device, dtype: torch.dtype, read_bytes: int = 0) -> Ceilings:
    """The best of a few runs each; `read_bytes` 0 is as much as no cache holds."""
    product = Product(device, dtype, 2048 if device.type == "cpu" else 0)
    size = read_bytes or READ_BYTES.get(device.type, READ_ELSEWHERE)
    flops = max(product.rate() for _ in range(RUNS))
    return Ceilings(_read_rate(device, size), flops)


def _read_rate(device: torch.device, size: int) -> float:
    large = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(RUNS + 1):
        wait(device)
        started = time.perf_counter()
        large.sum()
        wait(device)
        best = max(best, size / (time.perf_counter() - started))
    return best
