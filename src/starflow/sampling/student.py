"""A student draws in one parallel pass what its flow draws token by token (BiFlow, arXiv 2512.10953): an approximation.

A flow maps data x^0 through K blocks to noise x^K = z. Its student is a Transformer without a causal mask that starts
at z, comes by the same states in the other direction, x^(K-1) to x^0, a group of layers each, and then takes off the
noise that the flow was trained with: its last group gives the clean latent. The guidance weight is an input, so that
a guided picture takes one pass too.

Contract: a student belongs to one flow, whose fingerprint it carries, and is refused beside another. It has no density:
where candidates are scored, or a likelihood is asked for, that is the flow's own, exact one.

`Companion` is what a student shares with a learned denoiser (`starflow.sampling.denoise`): the network over the flow's
tokens and condition, and the folder it is kept in, config.json with its weights.

Shapes: B batch, K candidates (or blocks, where the flow's are meant), C x H x W latents, N tokens, D token channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.checkpoint import assign_weights
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import Flow
from starflow.flow.tokens import Grid, grid_of, patchify, unpatchify
from starflow.io import files, weights
from starflow.nn.attention import BidirectionalTransformer, TransformerSpec
from starflow.nn.layers import LayerSpec

SAMPLED_VALUES = 64
"""Values of each tensor that a fingerprint reads."""


def fingerprint(flow: Flow) -> str:
    """A digest of a flow's weights that is the same in float32 and bfloat16, and however many files hold them.

    It reads the names and shapes, and some values of each tensor, so that it costs little of any flow.

    >>> from starflow.flow.model import STARFlow
    >>> flow = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> fingerprint(flow) == fingerprint(flow.bfloat16())
    True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(flow.state_dict().items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLED_VALUES)][:SAMPLED_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class CompanionConfig:
    """The sizes of a network beside a flow, and what it reads of that flow's tokens and condition.

    Raises:
        UserError: sizes that no network can have.
    """

    teacher: str
    """Fingerprint of the flow it was trained beside."""
    in_channels: int
    """C, channels of the flow's input."""
    patch_size: int
    """Side of the patch that is one token."""
    channel_first: bool
    """Order of a token's channels; see `starflow.flow.tokens.patchify`."""
    span: float
    """Side in tokens that positions cover."""
    txt_size: int
    """Condition tokens; 0 is none."""
    txt_dim: int
    """Width of a condition token."""
    num_classes: int
    """Classes of a TarFlow; 0 is none."""
    channels: int
    """Width of the network."""
    layers: tuple[int, ...]
    """Layers of each group, in the order of the pass."""
    head_dim: int
    """Width of an attention head, a multiple of 16."""

    def __post_init__(self) -> None:
        if self.head_dim < 16 or self.head_dim % 16 or self.channels < 1 or self.channels % self.head_dim:
            raise UserError(
                f"channels is {self.channels} and head_dim {self.head_dim}, expected a multiple of 16 for a head, and "
                "a multiple of that for the width"
            )
        if not self.layers or min(self.layers) < 1:
            raise UserError(f"layers is {list(self.layers)}, expected at least 1 a group")

    @property
    def token_channels(self) -> int:
        """D"""
        return self.in_channels * self.patch_size**2


def inputs_of(flow: Flow) -> dict[str, Any]:
    """What a `CompanionConfig` says of a flow, by its keys; a condition that the flow does not read is left out."""
    config = flow.config
    tokens = config.txt_size if isinstance(config, STARFlowConfig) else 0
    return {
        "teacher": fingerprint(flow),
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "channel_first": flow.channel_first,
        "span": float(config.span if isinstance(config, STARFlowConfig) else config.grid_side),
        "txt_size": tokens,
        "txt_dim": config.txt_dim if isinstance(config, STARFlowConfig) and tokens else 0,
        "num_classes": config.num_classes if isinstance(config, TarFlowConfig) else 0,
    }


class Companion(nn.Module):
    """A network beside a flow, on its tokens and condition. Subclasses say what it gives."""

    kind: ClassVar[str]
    """What config.json calls it."""
    config_class: ClassVar[type[CompanionConfig]]
    config: CompanionConfig

    def __init__(self, config: CompanionConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.channels // config.head_dim
        layer = LayerSpec(config.channels, heads, heads, config.head_dim, 4 * config.channels, norm_type="rms_norm")
        self.transformer = BidirectionalTransformer(
            TransformerSpec(
                config.token_channels,
                config.layers,
                layer,
                config.span,
                config.txt_size,
                config.txt_dim,
                config.num_classes,
            )
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def to_tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, C, H, W) to tokens (B, N, D) and their grid.

        Raises:
            UserError: a shape that the flow cannot take either.
        """
        config = self.config
        grid = grid_of(x, config.in_channels, config.patch_size)
        return patchify(x.float(), config.patch_size, channel_first=config.channel_first), grid

    def from_tokens(self, tokens_BND: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, D) to (B, C, H, W)."""
        return unpatchify(tokens_BND, grid, self.config.patch_size, channel_first=self.config.channel_first)

    def check_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        """The condition as the network takes it; None of classes is no class.

        Raises:
            UserError: another shape than the flow's conditions have.
        """
        config = self.config
        if config.num_classes:
            return torch.full((batch,), -1, dtype=torch.int64, device=self.device) if condition is None else condition
        expected = (batch, config.txt_size, config.txt_dim) if config.txt_size else None
        received = None if condition is None else tuple(condition.shape)
        if received != expected:
            raise UserError(f"the condition's shape is {received}, expected {expected}, as the flow takes it")
        return condition

    def check_teacher(self, flow: Flow) -> None:
        """Raises UserError: the flow is another than the one that this network was trained beside."""
        found = fingerprint(flow)
        if found != self.config.teacher:
            raise UserError(
                f"the {self.kind} was trained beside another flow (fingerprint {self.config.teacher[:12]}, this one's "
                f"is {found[:12]}): train one by `starflow train-{self.kind}`, or take its folder away"
            )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the weights and then config.json into a folder, which is made where it is missing.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = files.check_output_folder(Path(folder))
        weights.write(folder, ((name, tensor.to(dtype)) for name, tensor in self.state_dict().items()))
        files.write_json(folder / "config.json", {"kind": self.kind, **to_dict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """What `save_pretrained` wrote, in float32 on the CPU, without gradients.

        Raises:
            UserError: nothing there, another kind of network, or damaged files.
        """
        folder = Path(folder)
        values = dict(files.read_json(folder / "config.json"))
        kind = values.pop("kind", None)
        if kind != cls.kind:
            raise UserError(f"{folder} holds a '{kind}', expected a {cls.kind}, as `starflow train-{cls.kind}` writes")
        network = cls(from_dict(cls.config_class, values))
        assign_weights(network, weights.read(folder), str(folder))
        return network.float().eval().requires_grad_(False)


@dataclass(frozen=True)
class StudentConfig(CompanionConfig):
    """A student's sizes, a group of layers for each block of its flow and one more, and how it is drawn from."""

    temperature: float = 1.0
    """Factor on the noise that it draws at by default."""
    largest_guidance: float = 0.0
    """The largest guidance weight of its training."""
    guidance: float | None = None
    """Guidance weight that it draws at by default; None is the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None and not 0 <= self.guidance <= self.largest_guidance:
            raise UserError(
                f"a student's guidance is {self.guidance:g}, expected 0 to the largest of its training, "
                f"{self.largest_guidance:g}"
            )


class StudentOutput(NamedTuple):
    """The result of a student's pass."""

    clean: Tensor
    """(B, C, H, W), latents without the noise of the flow's training, float32."""
    states: list[Tensor]
    """What the student makes of the flow's states x^0 .. x^(K-1), each (B, N, D) in raster order, float32."""


class Student(Companion):
    """See the module's docstring.

    >>> from starflow.flow.model import STARFlow
    >>> flow = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> student = Student(StudentConfig(**inputs_of(flow), channels=32, layers=(1, 1, 1), head_dim=16))
    >>> out = student(torch.zeros(3, 2, 4, 4))
    >>> out.clean.shape, [state.shape for state in out.states]
    (torch.Size([3, 2, 4, 4]), [torch.Size([3, 16, 2]), torch.Size([3, 16, 2])])
    """

    kind = "student"
    config_class = StudentConfig
    config: StudentConfig

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        width, tokens = config.channels, config.token_channels
        self.guidance = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        last = self.guidance[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # The projection of x^0 is the network's own output there, those of the other states serve the training. No norm
        # stands before them: what a linear flow does to a token's size is passed on exactly.
        self.heads = nn.ModuleList(nn.Linear(width, tokens) for _ in config.layers)

    def forward(self, z: Tensor, condition: Tensor | None = None, guidance_B: Tensor | None = None) -> StudentOutput:
        """Noise to clean latents.

        Args:
            z: (B, C, H, W), standard normal, or what the flow makes of data.
            condition: as for the flow.
            guidance_B: weight w >= 0 of each picture; None is 0, unguided.

        Raises:
            UserError: a shape that the flow cannot take either.
        """
        tokens, grid = self.to_tokens(z)
        weight = tokens.new_zeros(len(z)) if guidance_B is None else guidance_B.to(tokens)
        vector = self.guidance(weight.log1p()[:, None].to(self.transformer.proj_in.weight.dtype))
        hidden = self.transformer(tokens, grid, self.check_condition(condition, len(z)), vector)
        *states, clean = [head(one).float() for head, one in zip(self.heads, hidden, strict=True)]
        return StudentOutput(self.from_tokens(clean, grid), states[::-1])


@torch.no_grad()
def draw_by_student(
    student: Student,
    flow: Flow,
    noise: Tensor,
    condition: Tensor | None,
    guidance_B: Tensor,
    own_noise: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One parallel pass of each candidate; of several, the one whose latent the flow finds the likeliest is kept.

    The flow's density is of noised latents, so each candidate is scored with the picture's own noise added to it, the
    same for all candidates of a picture.

    Args:
        student: of this flow.
        flow: STARFlow or TarFlow.
        noise: (B, K, C, H, W), times the temperature.
        condition: of each picture, as for the flow.
        guidance_B: weight of each picture.
        own_noise: (B, C, H, W), of the standard deviation of the flow's training; read where K is above 1.
        batch_size: candidates at once; changes memory, not pictures.
        progress: called with the candidates drawn so far and in all.

    Returns:
        Clean latents (B, C, H, W).

    Raises:
        UserError: shapes that the flow cannot take.
    """
    pictures, candidates = noise.shape[:2]
    drawn, scores = [], []
    for rows in torch.arange(pictures * candidates, device="cpu").split(batch_size):
        of = (rows // candidates).to(noise.device)
        given = None if condition is None else condition[of]
        clean = student(noise.flatten(0, 1)[rows.to(noise.device)], given, guidance_B.to(noise.device)[of]).clean
        drawn.append(clean)
        if candidates > 1:
            scores.append(flow.log_prob(clean + own_noise[of], given))
        if progress is not None:
            progress(int(rows[-1]) + 1, pictures * candidates)
    latents: Tensor = torch.cat(drawn).unflatten(0, (pictures, candidates))
    if candidates == 1:
        return latents.flatten(0, 1)
    best = torch.cat(scores).view(pictures, candidates).nan_to_num(nan=-torch.inf).argmax(1)
    kept: Tensor = latents[torch.arange(pictures, device=best.device), best]
    return kept


def group_sizes(layers: int | Sequence[int], blocks: int) -> tuple[int, ...]:
    """Layers of a student's groups, next to the noise first: one number for all, or one each of `blocks` + 1.

    Raises:
        UserError: another number of groups.

    >>> group_sizes(2, 4), group_sizes((3, 1, 1), 2)
    ((2, 2, 2, 2, 2), (3, 1, 1))
    """
    groups = (layers,) * (blocks + 1) if isinstance(layers, int) else tuple(layers)
    if len(groups) != blocks + 1:
        raise UserError(
            f"{len(groups)} groups of layers for a flow of {blocks} blocks: give {blocks + 1}, one a block from the "
            "noise to the data and one for the noise of the data, or one number for all"
        )
    return groups
