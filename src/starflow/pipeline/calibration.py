"""A pipeline chooses by measuring, once, how each of its blocks is solved on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starflow.pipeline.config import latent_shape
from starflow.pipeline.inputs import encode_prompts, example_prompts
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.calibrate import CalibrationData, calibrate
from starflow.sampling.policy import Policy, SampleSettings, keep_policy
from starflow.sampling.sampler import noise_from_seeds

PICTURES = 8
"""Pictures that are drawn to measure with, where no prompts are given."""


def calibrate_pipeline(
    pipeline: StarFlowPipeline,
    prompts: Sequence[str] | None = None,
    *,
    guidance: float | None = None,
    batches: Sequence[int] = (1, 4, 16),
    tolerance: float = 1e-3,
    repeats: int = 3,
    note: Callable[[str], None] = lambda _: None,
) -> Policy:
    """Choose by measuring how each block is solved here; `solver="auto"` and `save_pretrained` use it then.

    Args:
        pipeline: whose blocks are measured; its flow keeps the policy.
        prompts: of the kind that will be drawn; None is some of our own, or the model's classes.
        guidance: weight to measure with; by default the model's own.
        batches: sizes to time; each block gets one choice for all of them.
        tolerance: bound on the residual of every block and picture.
        repeats: timed runs, of which the fastest counts.
        note: told what is being measured.

    Raises:
        UserError: a prompt that the model cannot take.
    """
    data = calibration_data(pipeline, prompts, guidance=guidance, tolerance=tolerance)
    policy = calibrate(pipeline.flow, data, batches, repeats, note)
    keep_policy(pipeline.flow, policy)
    return policy


def calibration_data(
    pipeline: StarFlowPipeline,
    prompts: Sequence[str] | None = None,
    *,
    guidance: float | None = None,
    tolerance: float = 1e-3,
) -> CalibrationData:
    """Noise and encoded conditions to measure with, a picture a prompt; as for `calibrate_pipeline`."""
    config, flow = pipeline.config, pipeline.flow
    drawn = list(prompts or example_prompts(pipeline.conditioner, PICTURES))
    condition, null = encode_prompts(drawn, pipeline.conditioner, flow, config)
    noise = config.temperature * noise_from_seeds(range(len(drawn)), latent_shape(config, flow.config)).to(flow.device)
    weight = config.guidance if guidance is None else guidance
    return CalibrationData(noise, condition, null, SampleSettings(weight, tolerance=tolerance))
