"""Time 50 and 250 steps of a diffusion Transformer of as many parameters, which a user might pick instead.

The architecture is diffusers' DiTTransformer2DModel as DiT/2 has it (arXiv 2212.09748): patches of 2 latents, adaptive
norms, class and timestep, guidance by a second half of the batch, predicted variance. It is as wide as our model, and
so deep that the parameters are equal, as nearly as whole layers are. Its weights are random: they say nothing of
pictures, and a step costs the same. Three steps are timed, with the scheduler's update, and multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starflow.bench.limits import Baseline, DrawTask

STEPS = (50, 250)
TIMED = 3
HEAD, PATCH, CLASSES = 64, 2, 1000


def baselines(task: DrawTask) -> list[Baseline]:
    """One for each number of steps; without diffusers none."""
    try:
        import diffusers
    except ImportError:
        return []
    network = network_like(task.model, diffusers)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS[0])
    size = sum(one.numel() for one in network.parameters()) / 1e6
    layers, width = len(network.transformer_blocks), network.inner_dim
    shape = f"{size:.1f} M parameters in {layers} layers of width {width}, patches of {PATCH}"
    note = f"random weights, {shape}; {TIMED} steps timed and multiplied"
    return [
        Baseline(f"DiT, {steps} steps", lambda: draw(network, scheduler, task), steps / TIMED, note) for steps in STEPS
    ]


def network_like(model: Any, diffusers: Any) -> Any:
    """A DiT of the model's width, precision and device, and of as many layers as its parameters pay for."""
    config = model.config
    wanted, parameter = sum(one.numel() for one in model.parameters()), next(model.parameters())
    heads = max(1, config.channels // HEAD)

    def build(layers: int) -> Any:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=HEAD, in_channels=config.in_channels,
            out_channels=2 * config.in_channels, num_layers=layers, sample_size=config.img_size, patch_size=PATCH,
            num_embeds_ada_norm=CLASSES,
        )  # fmt: skip

    with torch.device("meta"):
        one, two = (sum(p.numel() for p in build(layers).parameters()) for layers in (1, 2))
    layers = max(1, 1 + round((wanted - one) / (two - one)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(layers).to(parameter.device, parameter.dtype).requires_grad_(False).eval()


@torch.no_grad()
def draw(network: Any, scheduler: Any, task: DrawTask) -> Tensor:
    """The first steps of a batch of pictures as large as the task's."""
    x = task.noise.to(next(network.parameters()).dtype)
    batch, channels = x.shape[:2]
    label = torch.arange(batch, device=x.device) % CLASSES
    labels = torch.cat((label, torch.full_like(label, CLASSES))) if task.guidance else label
    for step in scheduler.timesteps[:TIMED]:
        both = torch.cat((x, x)) if task.guidance else x
        times = step.to(x.device).expand(len(both))
        noise = network(both, timestep=times, class_labels=labels).sample[:, :channels]
        if task.guidance:
            given, null = noise.chunk(2)
            noise = null + (1 + task.guidance) * (given - null)
        x = scheduler.step(noise, step, x).prev_sample
    return x
