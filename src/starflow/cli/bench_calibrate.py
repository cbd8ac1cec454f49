"""`starflow bench calibrate`: measure once how a model's blocks are best solved, and keep it beside the weights."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, Precision, pick_device, pick_dtype
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.sampling.plan import Plan, Policy


@dataclass(frozen=True)
class BenchCalibrateOptions:
    """Measure how each block of a trained model converges and which solver is the fastest here.

    The result, policy.json, lies beside the flow's weights, where --solver auto finds it. Another machine believes its
    convergence, and times for itself.
    """

    EXAMPLES: ClassVar[str] = """
        starflow bench calibrate runs/tiny/model
        starflow bench calibrate glyphs --batches 1,16 --output policies
    """

    model: Annotated[str, Argument("bundled name, folder, or hub repository")] = "glyphs"
    batches: Annotated[str, Flag("pictures at once, separated by commas", "N,N")] = "1,4,16"
    guidance: Annotated[float | None, Flag("weight to measure with, beside none (default: the model's)", "W")] = None
    prompts: Annotated[str, Flag("a text file, one prompt a line (default: some of our own)", "FILE")] = ""
    tolerance: Annotated[float, Flag("bound on the residual of every block and picture")] = 1e-3
    repeats: Annotated[int, Flag("timed runs, of which the fastest counts", "N")] = 3
    output: Annotated[str, Flag("folder for policy.json (default: beside the weights)", "FOLDER")] = ""
    device: Annotated[Device, Flag("where to compute")] = "auto"
    dtype: Annotated[Precision, Flag("precision of the network")] = "float32"
    json: Annotated[bool, Flag("print the policy as JSON")] = False

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise UserError(
                f"--tolerance is {self.tolerance:g}, expected above 0: at 0 every block goes token by token"
            )
        if self.repeats < 1:
            raise UserError(f"--repeats is {self.repeats}, expected at least 1")
        parse_batches(self.batches)


def parse_batches(text: str) -> list[int]:
    """The numbers of "1,4,16".

    Raises:
        UserError: something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--batches is '{text}', expected whole numbers above 0 separated by commas, e.g. 1,4,16")
    return [int(part) for part in parts]


def bench_calibrate(options: BenchCalibrateOptions) -> None:
    """Run the command."""
    from starflow.cli.generate import read_prompt_file
    from starflow.components.releases import find_pipeline
    from starflow.config import to_dict
    from starflow.files import check_output_folder
    from starflow.flow.store import write_policy
    from starflow.pipeline import StarFlowPipeline

    prompts = read_prompt_file(Path(options.prompts)) if options.prompts else None
    folder = Path(options.output) if options.output else find_pipeline(options.model) / "flow"
    check_output_folder(folder)
    pipeline = StarFlowPipeline.from_pretrained(options.model, pick_device(options.device), pick_dtype(options.dtype))
    policy = pipeline.calibrate(
        prompts,
        guidance=options.guidance,
        batches=parse_batches(options.batches),
        tolerance=options.tolerance,
        repeats=options.repeats,
        note=lambda text: print(text, file=sys.stderr),
    )
    written = write_policy(folder, to_dict(policy))
    if options.json:
        print(json.dumps({"path": str(written), **to_dict(policy)}, indent=2))
        return
    print("\n".join([*convergence_text(policy), *(line for plan in policy.plans for line in plan_text(plan))]))
    print(written)


def convergence_text(policy: Policy) -> list[str]:
    """One line a block, the hardest to iterate first."""
    ranked = sorted(enumerate(policy.convergence), key=lambda pair: -pair[1].contraction)
    lines = ["blocks by how hard they are to iterate:"]
    for number, known in ranked:
        starts = ", ".join(f"{name} {value:.2f}" for name, value in known.starts.items())
        best = known.candidates[0] if known.candidates else None
        found = f"{best.passes} passes after {best.drafts} drafts" if best else "token by token"
        lines.append(f"  block {number}: contraction {known.contraction:.2f}; distance of starts: {starts}; {found}")
    return lines


def plan_text(plan: Plan) -> list[str]:
    """What was chosen for one batch size."""
    before = plan.sequential_seconds or sum(choice.sequential_seconds for choice in plan.choices)
    seconds = plan.seconds or before
    where = plan.situation
    lines = [
        f"batch {where.batch}, {where.tokens} tokens, {'guided' if where.guided else 'unguided'}, {where.dtype}, "
        f"{where.machine}: {before:.3f} s token by token, {seconds:.3f} s as planned ({before / seconds:.2f}x), "
        f"samples off by {plan.deviation:.1e}"
    ]
    for number, choice in enumerate(plan.choices):
        lines.append(
            f"  block {number}: {describe(choice.policy)}, {choice.seconds:.4f} s "
            f"against {choice.sequential_seconds:.4f}, residual {choice.residual:.1e}"
        )
    return lines


def describe(policy: Any) -> str:
    """A policy in words."""
    if policy.solver == "sequential":
        return "token by token"
    length = f"segments of {policy.segment}" if policy.segment else "whole sequence"
    return f"{length} from {policy.guess}{', drafted in bfloat16' if policy.draft else ''}"
