"""The card of a model that goes to the hub."""

from __future__ import annotations

from collections.abc import Mapping

from starflow.components import sizes
from starflow.components.config import PipelineConfig
from starflow.flow.model import Flow


def facts_of(config: PipelineConfig, model: Flow) -> dict[str, str]:
    """What a model is, in words: a table's rows."""
    flow, coder, reader = model.config, config.autoencoder, config.conditioner
    count = sum(parameter.numel() for parameter in model.parameters())
    layers = " ".join(str(flow.layers(block)) for block in range(flow.num_blocks))
    condition = f"{reader.kind}, {reader.size} x {reader.dim}, {reader.source}" if reader else "none"
    if reader and reader.kind == "class":
        condition = f"{len(reader.names)} classes"
    return {
        "flow": f"{type(model).__name__}, {count:,} parameters, layers a block {layers}, width {flow.channels}",
        "pictures": f"{config.image_size} px, sides in multiples of {sizes.multiple(config, flow)}"
        + (f", ratios {' '.join(config.aspects)}" if config.aspects else ""),
        "autoencoder": f"{coder.kind}, {coder.channels} channels, factor {coder.factor}"
        + (f", {coder.source}" if coder.source else ""),
        "condition": condition.rstrip(", "),
        "training noise": f"{config.noise}, {config.noise_std:g}" if config.noise == "gaussian" else config.noise,
        "samples are cleaned by": config.cleaning,
        "guidance": f"{config.guidance:g}",
        "temperature": f"{config.temperature:g}",
        "candidates a picture": f"{config.candidates}",
    }


def model_card(name: str, facts: Mapping[str, str], example: str, licence: str = "") -> str:
    """A card for the hub: what the model is, and how to use it.

    Args:
        name: the repository.
        facts: a table, what and value.
        example: the pipeline's call in Python, after `pipe`.
        licence: the hub's name for one, such as "apache-2.0"; "" says nothing.
    """
    kind = "unconditional-image-generation" if facts.get("condition", "none") == "none" else "text-to-image"
    head = ["library_name: starflow", f"pipeline_tag: {kind}", "tags: [normalizing-flow, starflow]"]
    head += [f"license: {licence}"] if licence else []
    table = [f"| {what} | {value} |" for what, value in facts.items()]
    return "\n".join(
        [
            *("---", *head, "---", f"# {name}", ""),
            "A normalizing flow for pictures (STARFlow, arXiv 2506.06276; TarFlow, arXiv 2412.06329): it samples, and",
            "it gives the exact likelihood of what it models.",
            "",
            *("| what | value |", "|---|---|", *table, ""),
            *("```python", "from starflow import StarFlowPipeline", ""),
            f'pipe = StarFlowPipeline.from_pretrained("{name}")',
            f'pipe{example}.images[0].save("picture.png")',
            *("```", ""),
            f"In a shell: `starflow generate --model {name}`. `starflow info {name} --verify` compares every file with",
            "its sha256.",
            "",
        ]
    )
