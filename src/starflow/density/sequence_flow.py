"""`SequenceFlow`: a TarFlow over vectors and sequences, with an optional context, as a density to fit and to draw from.

Contract: an event, a vector (D,) or a sequence (N, C), is mapped to noise by bounds, standardisation and autoregressive
blocks of alternating order; the log-density holds the logarithm of every one of these maps' Jacobians. A sequence that
is shorter than N is a prefix of the event: every block reads its tokens first, in its own order, so that attention,
which is causal, never meets the padding. The density is then p(x_1 .. x_n | n, context). As orders alternate, no
marginal of a part of a sequence is exact: missing values are an error.
(TarFlow, arXiv 2412.06329, section 2; STARFlow, arXiv 2506.06276, section 3.)

Shapes: R rows, E event shape, N tokens, C token channels, S condition tokens, W width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from starflow.config import from_dict, to_dict
from starflow.density.blocks import Bound, Gradient, SequenceBlocks, SequenceFlowConfig, within
from starflow.density.distribution import SequenceDistribution, Within, to_bounded, to_unbounded
from starflow.density.fit import FitOptions, FitResult, fit, split_rows
from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.io import files, weights

KIND = "sequence"
"""What config.json calls this kind of flow."""

SAMPLED_AT_ONCE = 4096
"""Rows that are drawn together, for the memory of keys and values."""

STANDARDISED_ROWS = 100_000
"""Training rows that the shift and scale are estimated from, at most."""

CHECKED_ROWS = 65_536
"""Rows of a data set that are checked together."""


class SequenceFlow(nn.Module):
    """A normalizing flow on vectors or sequences, whose density and samples are exact; a new one is the identity.

    Args:
        event_shape: (D,) of a vector, or (N, C) of a sequence of N steps.
        context_shape: () without a context, (K,) of a vector, or (M, K) of a sequence.
        bounds: (lower, upper) for each dimension of the event's last axis, None where there is no bound; () is none.
            Events lie between them and not on them, where the density is 0.
        variable_length: whether sequences have lengths of their own, up to N.
        patch_size: consecutive steps, or dimensions of a vector, in one token; numbers of one token are independent
            within a block.
        channels: width of the blocks.
        num_blocks: of alternating order.
        layers_per_block: Transformer layers of each.
        head_dim: width of an attention head.

    Raises:
        UserError: sizes that do not fit.

    >>> flow = SequenceFlow(event_shape=(3,), channels=32, num_blocks=2, layers_per_block=1)
    >>> round(flow().log_prob(torch.zeros(3)).item(), 3)  # three zeros under a standard normal
    -2.757
    >>> x = 5 + 2 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> result = flow.fit(x, max_epochs=1, progress=False)
    >>> flow().sample((4,)).shape, bool((result.heldout_nats + 3 * math.log(2) + 4.257) < 0.5)
    (torch.Size([4, 3]), True)
    """

    shift: Tensor
    scale: Tensor
    context_shift: Tensor
    context_scale: Tensor
    standardised: Tensor

    def __init__(
        self,
        event_shape: tuple[int, ...],
        context_shape: tuple[int, ...] = (),
        *,
        bounds: tuple[Bound, ...] = (),
        variable_length: bool = False,
        patch_size: int = 1,
        channels: int = 64,
        num_blocks: int = 4,
        layers_per_block: int = 2,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        self.config = config = SequenceFlowConfig(
            event_shape,
            context_shape,
            bounds,
            variable_length,
            patch_size,
            channels,
            num_blocks,
            layers_per_block,
            head_dim,
        )
        self.blocks = SequenceBlocks(config)
        inputs = config.context_shape[-1] if config.context_shape else 0
        for name, size in (("", config.event_shape[-1]), ("context_", inputs)):
            self.register_buffer(f"{name}shift", torch.zeros(size))
            self.register_buffer(f"{name}scale", torch.ones(size))
        self.register_buffer("standardised", torch.tensor(False))

    def forward(self, context: Tensor | None = None, lengths: Tensor | None = None) -> SequenceDistribution:
        """The distribution under a context.

        Args:
            context: (B, *context_shape), where the batch shape B may be () or have several axes.
            lengths: (B,) or broadcastable with it, 1 to N, of a flow of variable length.

        Raises:
            UserError: a context or lengths that are missing, superfluous, or of another shape.
        """
        shape = torch.Size()
        if context is not None:
            shape = self._check_context(context)
        elif self.config.context_shape:
            raise UserError(f"no context, expected one of shape (..., {_listed(self.config.context_shape)}): pass it")
        if (lengths is None) == self.config.variable_length:
            given, wanted = ("no lengths", "some") if lengths is None else ("lengths", "none")
            raise UserError(f"{given}, expected {wanted}: variable_length is {self.config.variable_length}")
        if lengths is not None:
            lengths = self._check_lengths(lengths)
            batch = _broadcast(shape, lengths.shape)
            lengths = lengths.expand(batch)
            if context is not None:
                context = context.expand(batch + self.config.context_shape)
            shape = batch
        return SequenceDistribution(self, context, lengths, shape, torch.Size(self.config.event_shape))

    def _check_context(self, context: Tensor) -> torch.Size:
        check_real("context", context)
        expected = self.config.context_shape
        rank = len(expected)
        if not expected:
            raise UserError(f"a context of shape {tuple(context.shape)}, expected none: context_shape is ()")
        if context.dim() < rank or tuple(context.shape[context.dim() - rank :]) != expected:
            raise UserError(f"the context has shape {tuple(context.shape)}, expected (..., {_listed(expected)})")
        strange = int((~context.to(self.work_dtype).isfinite()).sum())
        if strange:
            raise UserError(f"the context has {strange} values that are NaN or infinite, expected none: fill them in")
        return context.shape[: context.dim() - rank]

    def _check_lengths(self, lengths: Tensor) -> Tensor:
        check_real("lengths", lengths)
        if (
            lengths.is_floating_point()
            or lengths.dtype == torch.bool
            or bool(((lengths < 1) | (lengths > self.config.tokens)).any())
        ):
            some = lengths.flatten()[:8].tolist()
            raise UserError(f"the lengths are {some}, expected whole numbers from 1 to {self.config.tokens}")
        return lengths.long()

    # What a distribution needs of its flow.

    @property
    def work_dtype(self) -> torch.dtype:
        """Precision of the affine steps: at least float32."""
        return torch.promote_types(self.shift.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.shift.device

    @property
    def support(self) -> Within:
        """Events within the bounds."""
        return Within(self.config.bounds, len(self.config.event_shape))

    def check_events(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Events (R, E) in the working precision, with a value of the support in the place of padding.

        Raises:
            UserError: missing values, or complex ones.
        """
        check_real("data", x)
        x = x.to(self.work_dtype)
        if lengths is not None:
            inside = to_bounded(torch.zeros_like(self.shift, dtype=x.dtype), self.config.bounds)
            x = torch.where(self._within(lengths), x, inside)
        missing = int(x.isnan().sum())
        if missing:
            raise UserError(
                f"{missing} values are missing (NaN), expected none: blocks read an event from both ends, so that no "
                "density of a part is exact; fill them in, or cut sequences short and give lengths"
            )
        return x

    def log_prob_rows(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> Tensor:
        """log p of events (R, E) that `check_events` returned, (R,) in nats."""
        z, logdet = self.to_noise(x, context, lengths)
        constants = math.prod(self.config.event_shape) if lengths is None else self.config.token_channels * lengths
        nats: Tensor = -0.5 * (z.flatten(1).square().sum(1) + constants * math.log(2 * math.pi)) + logdet
        return nats

    def to_noise(self, x: Tensor, context: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Events (R, E) to noise (R, E), 0 in the padding, and log |det dz/dx| (R,) in nats."""
        unbounded, log_slope = to_unbounded(x, self.config.bounds)
        scale = self.scale.to(self.work_dtype)
        z, log_slope = (unbounded - self.shift) / scale, log_slope - scale.log()
        if lengths is not None:
            known = self._within(lengths)
            z, log_slope = torch.where(known, z, 0.0), torch.where(known, log_slope, 0.0)
        tokens, logdet = self.blocks(self._tokens(z), self._standard_context(context), lengths)
        return tokens.reshape(x.shape), logdet + log_slope.flatten(1).sum(1)

    def sample_rows(
        self, noise: Tensor, context: Tensor | None, lengths: Tensor | None, gradient: Gradient | None
    ) -> Tensor:
        """Noise (R, E) to events (R, E), 0 in the padding; differentiable where `gradient` says how."""
        if gradient is None and len(noise) > SAMPLED_AT_ONCE:
            parts = [slice(at, at + SAMPLED_AT_ONCE) for at in range(0, len(noise), SAMPLED_AT_ONCE)]
            drawn = (self.sample_rows(noise[a], _rows(context, a), _rows(lengths, a), None) for a in parts)
            return torch.cat(list(drawn))
        known = None if lengths is None else self._within(lengths)
        noise = noise if known is None else torch.where(known, noise, 0.0)
        tokens = self.blocks.inverse(self._tokens(noise), self._standard_context(context), lengths, gradient)
        x = to_bounded(tokens.reshape(noise.shape) * self.scale + self.shift, self.config.bounds)
        return x if known is None else torch.where(known, x, 0.0)

    def _standard_context(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context.to(self.work_dtype) - self.context_shift) / self.context_scale

    def _tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.config.tokens, self.config.token_channels)

    def _within(self, lengths: Tensor) -> Tensor:
        """(R, N) or (R, N, 1), as the event has it: what is no padding."""
        known = within(lengths, self.config.tokens)
        return known if len(self.config.event_shape) == 1 else known[..., None]

    # Fitting.

    def fit(
        self,
        x: Tensor,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        seed: int = 0,
        max_epochs: int = 200,
        batch_size: int = 256,
        lr: float = 1e-3,
        validation_fraction: float = 0.1,
        patience: int = 20,
        progress: bool = True,
    ) -> FitResult:
        """Maximise the likelihood, with early stopping on held-out rows; the best weights are kept.

        The first call also standardises events and contexts by the training rows; later ones go on from there. The
        initial weights are PyTorch's: `torch.manual_seed` before the flow is made repeats them.

        Args:
            x: (R, *event_shape). Only the rows of a batch are read at a time, so that a file may be larger than memory:
                `torch.from_numpy(numpy.load("x.npy", mmap_mode="c"))`.
            context: (R, *context_shape), or None without one.
            lengths: (R,) of a flow of variable length.
            seed: of the split into training and held-out rows, and of their order.
            max_epochs: passes over the training rows at the most.
            batch_size: rows of an update.
            lr: learning rate of Adam; halved when the held-out likelihood does not improve for a while.
            validation_fraction: share of the rows that is held out.
            patience: epochs without an improvement after which it ends.
            progress: whether to show a bar.

        Returns:
            The held-out likelihood of the weights that are kept, and the history.

        Raises:
            UserError: what `check_data` refuses, too few rows, or a diverging likelihood.
        """
        options = FitOptions(seed, max_epochs, batch_size, lr, validation_fraction, patience, progress)
        self.check_data(x, context, lengths)
        if not bool(self.standardised):
            some = split_rows(len(x), options)[0][:STANDARDISED_ROWS]
            self.standardise(x[some], _rows(context, some), _rows(lengths, some))

        def log_prob(rows: Sequence[Tensor]) -> Tensor:
            left = iter([one.to(self.device) for one in rows])
            events = next(left)
            contexts, counts = (None if one is None else next(left) for one in (context, lengths))
            return self.log_prob_rows(self.check_events(events, counts), contexts, counts)

        return fit(self, log_prob, [one for one in (x, context, lengths) if one is not None], options)

    @torch.no_grad()
    def standardise(self, x: Tensor, context: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Set the shift and scale of events and contexts from rows of data: one for each of their last axis.

        Raises:
            UserError: what `check_data` refuses, or no rows.
        """
        self.check_data(x, context, lengths)
        if not len(x):
            raise UserError("no rows to standardise by, expected at least 1")
        lengths = None if lengths is None else lengths.to(self.device)
        unbounded, _ = to_unbounded(self.check_events(x.to(self.device), lengths), self.config.bounds)
        known = None if lengths is None else within(lengths, self.config.tokens)
        if len(self.config.event_shape) == 1 and known is not None:  # each step is a dimension with rows of its own
            steps = [moments_of(unbounded[:, [n]], known[:, n]) for n in range(x.shape[1])]
            shift, scale = torch.cat([one for one, _ in steps]), torch.cat([one for _, one in steps])
        else:
            shift, scale = moments_of(unbounded, known)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        if context is not None:
            shift, scale = moments_of(context.to(self.device, self.work_dtype))
            self.context_shift.copy_(shift)
            self.context_scale.copy_(scale)
        self.standardised.fill_(True)

    def check_data(self, x: Tensor, context: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Read all rows of a data set, a part at a time, as a file that is mapped may be larger than memory.

        Raises:
            UserError: shapes that do not fit, missing or infinite values, or values outside the bounds or on one.
        """
        config = self.config
        contexts = context if config.context_shape else None
        counts = lengths if config.variable_length else None
        parts = (("data", x, config.event_shape), ("contexts", contexts, config.context_shape), ("lengths", counts, ()))
        for name, one, shape in parts:
            if one is not None:
                _check_rows(name, one, shape, x)
        infinite, outside = 0, 0
        for start in range(0, len(x), CHECKED_ROWS):
            rows = slice(start, start + CHECKED_ROWS)
            self(_rows(context, rows), _rows(lengths, rows))
            counts = None if lengths is None else lengths[rows].to(self.device)
            events = self.check_events(x[rows].to(self.device), counts)
            _, log_slope = to_unbounded(events, config.bounds)
            infinite += int((~events.isfinite()).flatten(1).any(1).sum())
            outside += int((~log_slope.isfinite()).flatten(1).any(1).sum())
        if infinite:
            raise UserError(f"{infinite} of {len(x)} rows have infinite values, expected none: leave them out")
        if outside:
            kind = str(self.work_dtype).removeprefix("torch.")
            where = f"are outside the bounds {config.bounds}, or in {kind} on one, where the density is 0"
            raise UserError(f"{outside} of {len(x)} rows {where}: widen them, or leave those out")

    # Saving.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `from_pretrained` reads.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(folder)
        files.check_output_folder(folder)
        weights.write(folder, self.state_dict().items())
        files.write_json(folder / checkpoint.CONFIG_NAME, {"kind": KIND, **to_dict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The flow that `save_pretrained` wrote, on the CPU, in the precision that was saved.

        Raises:
            UserError: no such folder, another kind of model, a damaged file, missing or unexpected keys.
        """
        folder = Path(folder)
        options = files.read_json(folder / checkpoint.CONFIG_NAME)
        if not isinstance(options, Mapping) or options.get("kind") != KIND:
            raise UserError(
                f"{folder} holds no flow on sequences: expected one that SequenceFlow.save_pretrained wrote"
            )
        config = from_dict(SequenceFlowConfig, {key: value for key, value in options.items() if key != "kind"})
        flow = cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
        checkpoint.assign_weights(flow, weights.read(folder), str(folder))
        return flow


def moments_of(x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column of the last axis, in any unit.

    A column that does not vary by more than numbers of its size are rounded has a deviation of 1; one of which no row
    counts has a mean of 0 too.

    Args:
        x: (..., K).
        counted: (...) which rows count; None is all.

    >>> moments_of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    (tensor([2., 5.]), tensor([1., 1.]))
    """
    rows = x.flatten(0, -2) if counted is None else x[counted]
    if not len(rows):
        return x.new_zeros(x.shape[-1]), x.new_ones(x.shape[-1])
    mean = rows.mean(0)
    unit = (rows - mean).abs().amax(0)
    safe = torch.where(unit > 0, unit, 1.0)
    deviation = unit * ((rows - mean) / safe).square().mean(0).sqrt()  # squares of small and large numbers are not safe
    constant = deviation <= 8 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(constant, torch.ones_like(deviation), deviation)


def check_real(name: str, given: Tensor) -> None:
    """Refuse what is no tensor of real numbers.

    Raises:
        UserError: it is of another type, or complex.
    """
    if not isinstance(given, Tensor):
        raise UserError(f"the type of {name} is {type(given).__name__}, expected a tensor: torch.as_tensor makes one")
    if given.is_complex():
        raise UserError(f"{name} of complex numbers, expected real ones: torch.view_as_real makes two of each")


def _check_rows(name: str, given: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_real(name, given)
    if not given.dim() or tuple(given.shape[1:]) != shape:
        expected = ", ".join(("rows", *map(str, shape))) if shape else "rows,"
        raise UserError(f"{name} of shape {tuple(given.shape)}, expected ({expected})")
    if len(given) != len(x):
        raise UserError(f"{len(x)} rows of data with {len(given)} {name}: give one for each row")


def _broadcast(context: torch.Size, lengths: torch.Size) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(context, lengths))
    except RuntimeError:
        raise UserError(f"lengths of shape {tuple(lengths)} for contexts of batch shape {tuple(context)}") from None


def _rows(tensor: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
