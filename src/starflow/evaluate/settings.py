"""How much is measured, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from starflow.errors import UserError
from starflow.evaluate.likelihood import BitsPerDim
from starflow.evaluate.scores import Classification, Outliers

if TYPE_CHECKING:
    from PIL.Image import Image

LogLine = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured."""

    samples: int = 1000
    tuning_samples: int = 250
    """Samples per guidance weight when the best is chosen."""
    guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)
    prompts: tuple[str, ...] = ()
    """Prompts of the sheet, prompt i with seed i; none are those of some held-out pictures."""
    references: int = 5000
    """Pictures of each split, at most, that distances are measured to."""
    pictures: int = 0
    """Pictures of each split, at most, whose likelihood is measured; 0 is all held out, and as many of training."""
    draws: int = 1
    """Draws of the noise a likelihood is averaged over."""
    only_likelihood: bool = False
    """Leave out reconstructions, samples and distances."""
    classify: bool = False
    """Measure argmax_c log p(x | c) as a classifier, on a model with classes."""
    reference_moments: str = ""
    """A file of feature moments, such as ADM's .npz, to measure a Frechet distance to as well."""
    keep_moments: str = ""
    """A .safetensors file for the feature moments of the held-out pictures, to measure others to."""

    def __post_init__(self) -> None:
        if min(self.samples, self.tuning_samples, self.references) < 2 or self.pictures < 0 or self.draws < 1:
            raise UserError(
                f"samples {self.samples}, tuning_samples {self.tuning_samples}, references {self.references}, pictures "
                f"{self.pictures}, draws {self.draws}: expected at least 2, 2, 2, 0 and 1"
            )
        if not self.guidance or min(self.guidance) < 0:
            raise UserError(f"guidance weights {self.guidance}: expected at least one, none below 0")


Distances = dict[str, dict[str, float]]
"""By set (floor, autoencoder, samples with and without guidance), then by measure; `count` and `not_finite` too."""


@dataclass(frozen=True)
class ContactSheets:
    """Pictures for a person to look at."""

    prompts: tuple[str, ...] = ()
    samples: list[Image] = field(default_factory=list)
    nearest: list[Image] = field(default_factory=list)
    """Per sample, the nearest training picture."""
    originals: list[Image] = field(default_factory=list)
    reconstructions: list[Image] = field(default_factory=list)
    """Of the originals, with the flow's noise on their latents."""


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured; the sheets stay out of the JSON. What a plan leaves out is empty or None."""

    likelihood: dict[str, BitsPerDim]
    """By split."""
    counts: dict[str, int]
    features: str = ""
    """The network of the distances."""
    reconstruction: dict[str, float] = field(default_factory=dict)
    """Mean PSNR in dB of held-out pictures by latent noise."""
    distances: Distances = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    """Kernel distance by guidance weight, on fewer samples."""
    guidance: float = 0.0
    """The best weight, at which the sheet is made."""
    retrieval: dict[str, float] = field(default_factory=dict)
    """Share whose nearest training picture shows the prompted concept."""
    classification: Classification | None = None
    outliers: Outliers | None = None
    sheets: ContactSheets = field(default_factory=ContactSheets)

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        values = {name: value for name, value in vars(self).items() if name != "sheets"}
        values["likelihood"] = {split: asdict(found) for split, found in self.likelihood.items()}
        for name in ("classification", "outliers"):
            values[name] = asdict(values[name]) if values[name] else None
        return values
