"""A flow on two numbers, from scratch: fit two half moons and compare the density with what was drawn.

    python examples/two_moons.py moons.png

A "picture" here has one channel and two pixels, x and y. Three blocks of alternating order, as universality asks for
(STARFlow, arXiv 2506.06276, section 3.1). Takes about half a minute and prints the held-out likelihood in nats.
"""

from __future__ import annotations

import math
import sys

import torch
from PIL import Image
from torch import Tensor

from starflow import STARFlow, sample
from starflow.flow.config import STARFlowConfig

STEPS = 400
SIDE = 160


def moons(count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 1, 2) points on two half circles, with noise of 0.1."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    points = torch.stack([x, y], dim=1)
    return (points + 0.1 * torch.randn(count, 2, generator=generator)).view(count, 1, 1, 2)


def histogram(points: Tensor) -> Tensor:
    """(SIDE, SIDE) picture of where points lie, dark where there are many."""
    cells = ((points.view(-1, 2) + 2) / 4 * SIDE).long().clamp(0, SIDE - 1)
    counts = torch.zeros(SIDE, SIDE).index_put_((SIDE - 1 - cells[:, 1], cells[:, 0]), torch.ones(1), accumulate=True)
    return 255 * (1 - (counts / 6).clamp(max=1))


def main() -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    config = STARFlowConfig(in_channels=1, img_size=2, channels=64, num_blocks=3, layers_per_block=1, head_dim=32)
    flow = STARFlow(config)
    optimiser = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    for step in range(STEPS):
        loss = -flow.log_prob(moons(512, draw)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: {float(loss.detach()):.3f} nats")
    with torch.no_grad():
        print(f"held out: {-float(flow.log_prob(moons(5000, draw)).mean()):.3f} nats")
    made = sample(flow, torch.randn(5000, 1, 1, 2, generator=draw))
    both = torch.cat([histogram(moons(5000, draw)), histogram(made)], dim=1)
    Image.fromarray(both.byte().numpy(), "L").save(sys.argv[1] if len(sys.argv) > 1 else "moons.png")


if __name__ == "__main__":
    main()
