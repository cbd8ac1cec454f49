"""Golden fixtures: a model, a stopped run, and what they gave on one processor.

Made at commit 454356fd3c70, before the tree was reorganised, by `python -m tests.golden.make` in the root of the
checkout with nothing in this folder but this file and recipe.yaml. Do not remake: the fixtures are there to hold later
code to what that commit wrote, read and computed. Only public names are used, here and in tests/test_golden.py.

    recipe.yaml            the run
    model/                 its pipeline after an uninterrupted run, and so also the final weights
    run/                   the same run stopped by Ctrl-C before its end, without what a resume does not read
    flows/                 a tiny STARFlow and a tiny TarFlow, with random weights everywhere
    expected.json          where it was made, the cases, the run's log, hashes of the arrays
    expected.safetensors   the arrays
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from starflow import STARFlow, StarFlowPipeline, TarFlow, denoise, sample

HERE = Path(__file__).parent
STOP_AFTER = 5
"""Updates in the log when the run is told to stop."""
TIMED = ("pictures_per_second", "data_wait", "memory_gib", "tflops", "utilisation")
"""What of a log depends on the clock or the machine."""
LEFT_OUT = ("tensorboard", "samples", "best", ".lock", "autoencoder/checkpoints")
"""What of a run a resume does not read."""

DRAWN: dict[str, dict[str, Any]] = {
    f"{solver}_{number}": {"solver": solver, **case}
    for solver in ("sequential", "jacobi")
    for number, case in enumerate(
        (
            {"prompt": ["star", "ring"], "seed": 0},
            {"prompt": ["circle", "cross"], "seed": 7, "guidance": 0.0},
            {"prompt": ["square", "triangle", ""], "seed": 100, "guidance": 2.5, "candidates": 3},
        )
    )
}
"""Arguments of calls of the small model. The solver is named: what "auto" takes is policy.json's to say."""
BUNDLED: dict[str, dict[str, Any]] = {
    "glyphs_one": {
        "prompt": ["a red apple", "an evergreen tree"],
        "seed": 3,
        "candidates": 1,
        "solver": "sequential",
    },
    "glyphs_usual": {"prompt": ["a red apple", "an evergreen tree"], "seed": 3, "solver": "sequential"},
}
"""Arguments of calls of the bundled model."""


def machine() -> dict[str, str]:
    """What bit-for-bit equality depends on: the processor, what it can do, and the libraries that compute."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.is_file() else ""
    name, flags = (re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE) for key in ("model name", "flags"))
    vectors = sorted(flag for flag in (flags[1].split() if flags else []) if re.match("avx|amx|fma|sse", flag))
    return {
        "processor": name[1] if name else platform.processor(),
        "vector_flags_sha256": hashlib.sha256(" ".join(vectors).encode()).hexdigest(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def command(recipe: Path, run: Path) -> list[str]:
    """The command line of the training."""
    return [sys.executable, "-m", "starflow", "train", str(recipe), "--output", str(run)]


def environment(cache: Path) -> dict[str, str]:
    """One thread, and no compiled loop of an earlier process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "STARFLOW_CACHE": str(cache)}


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def pixels(images: list[Image.Image]) -> Tensor:
    """Pictures as (B, H, W, 3) of 8 bits."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])


def likelihoods(pipeline: StarFlowPipeline, pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Nats of pictures under their prompts and under none, and their z."""
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    pairs = list(zip(images, prompts, strict=True))
    nats = [pipeline.log_prob(image, prompt, seed=5).nats for image, prompt in pairs]
    unconditional = [pipeline.log_prob(image, seed=5, draws=2).nats for image in images]
    return {
        "nats": torch.tensor(nats, dtype=torch.float64),
        "nats_unconditional": torch.tensor(unconditional, dtype=torch.float64),
        "z": torch.cat([pipeline.encode(image, prompt) for image, prompt in pairs]),
    }


def starflow_outputs(flow: STARFlow, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward, samples and a Tweedie step."""
    x, condition, null, noise = (inputs[name] for name in ("x", "condition", "null", "noise"))
    with torch.no_grad():
        z, logdet = flow(x, condition)
    return {
        "z": z,
        "logdet": logdet,
        "log_prob": flow.log_prob(x, condition).detach(),
        "sample_w0": sample(flow, noise, condition),
        "sample_w2": sample(flow, noise, condition, null, 2.0),
        "sample_w2_jacobi": sample(flow, noise, condition, null, 2.0, "jacobi", tolerance=1e-6),
        "denoised": denoise(flow, x, condition, sigma=0.3),
    }


def tarflow_outputs(flow: TarFlow, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward with and without labels, and samples."""
    x, label, noise = (inputs[name] for name in ("x", "label", "noise"))
    with torch.no_grad():
        z, logdet = flow(x, label)
        unconditional, _ = flow(x)
    return {
        "z": z,
        "logdet": logdet,
        "z_unconditional": unconditional,
        "sample_w0": sample(flow, noise, label),
        "sample_w1": sample(flow, noise, label, None, 1.0, guidance_rule="linear", guidance_schedule="linear"),
        "sample_w1_jacobi": sample(flow, noise, label, None, 1.0, "jacobi", guidance_rule="linear", tolerance=1e-6),
        "sample_attention": sample(flow, noise, None, None, 1.0, guidance_rule="linear", attention_temperature=0.5),
    }


def trained(folder: Path) -> tuple[Path, Path]:
    """The run without a stop, and the same run stopped, both below `folder`."""
    whole, stopped = folder / "whole", folder / "stopped"
    surroundings = environment(folder / "cache")
    subprocess.run(command(HERE / "recipe.yaml", whole), env=surroundings, check=True)
    process = subprocess.Popen(command(HERE / "recipe.yaml", stopped), env=surroundings)
    log = stopped / "log.jsonl"
    while process.poll() is None:
        if log.is_file() and log.read_text().count('"loss"') >= STOP_AFTER:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(1e-3)
    process.wait()
    assert not (stopped / "model").exists(), "it came to its end before it was stopped: try again"
    return whole, stopped


def keep_run(stopped: Path, target: Path) -> None:
    """Copy what a resume reads, with the newest checkpoint only, and without the place where it was made."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(stopped)
        return [name for name in names if name in LEFT_OUT or (inside / name).as_posix() in LEFT_OUT]

    shutil.copytree(stopped, target, ignore=left_out)
    for old in sorted((target / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(old)
    info = target / "latents" / "info.json"
    info.write_text(info.read_text().replace(f"{stopped.parent}/", ""))


def random_flows() -> tuple[STARFlow, TarFlow]:
    """Two tiny flows in which every weight, those that begin at zero too, is random."""
    torch.manual_seed(0)
    configs = [typing.get_type_hints(kind)["config"] for kind in (STARFlow, TarFlow)]
    starflow = STARFlow(
        configs[0](
            in_channels=3,
            img_size=8,
            patch_size=2,
            channels=32,
            num_blocks=3,
            layers_per_block=1,
            mlp_hidden=(32, 48, 64),
            head_dim=32,
            txt_size=3,
            txt_dim=8,
        )
    )
    tarflow = TarFlow(
        configs[1](
            in_channels=3,
            img_size=8,
            patch_size=2,
            channels=16,
            num_blocks=2,
            layers_per_block=1,
            num_classes=4,
            head_dim=8,
        )
    )
    for flow in (starflow, tarflow):
        for parameter in flow.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return starflow, tarflow


def main() -> None:
    """Write everything."""
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    arrays: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        os.environ["STARFLOW_CACHE"] = str(temporary / "cache")
        whole, stopped = trained(temporary)
        shutil.copytree(whole / "model", HERE / "model")
        keep_run(stopped, HERE / "run")
        log = log_of(whole)
        pipeline = StarFlowPipeline.from_pretrained(HERE / "model")
        for case, arguments in DRAWN.items():
            drawn = pipeline(**arguments)
            arrays[f"model/{case}/pixels"] = pixels(drawn.images)
            arrays[f"model/{case}/latents"] = drawn.latents
            for part, values in likelihoods(pipeline, pixels(drawn.images), drawn.prompts).items():
                arrays[f"model/{case}/{part}"] = values
        bundled = StarFlowPipeline.from_pretrained("glyphs")
        for case, arguments in BUNDLED.items():
            arrays[f"bundled/{case}/pixels"] = pixels(bundled(**arguments).images)
        built = [path.name for path in (temporary / "cache").glob("*.so")]
        assert not built, f"the compiled loop took part: {built}"
    starflow, tarflow = random_flows()
    starflow.save_pretrained(HERE / "flows" / "starflow")
    tarflow.save_pretrained(HERE / "flows" / "tarflow")
    inputs = {
        "starflow": {
            "x": torch.randn(2, 3, 8, 8),
            "condition": torch.randn(2, 3, 8),
            "null": torch.randn(1, 3, 8),
            "noise": torch.randn(2, 3, 8, 8),
        },
        "tarflow": {"x": torch.randn(2, 3, 8, 8), "label": torch.tensor([1, 3]), "noise": torch.randn(2, 3, 8, 8)},
    }
    outputs = {
        "starflow": starflow_outputs(starflow, inputs["starflow"]),
        "tarflow": tarflow_outputs(tarflow, inputs["tarflow"]),
    }
    for kind in inputs:
        arrays |= {f"{kind}/inputs/{name}": value for name, value in inputs[kind].items()}
        arrays |= {f"{kind}/outputs/{name}": value for name, value in outputs[kind].items()}
    arrays = {name: value.contiguous() for name, value in arrays.items()}
    weights = HERE / "model" / "flow" / "model.safetensors"
    expected = {
        "commit": commit,
        "machine": machine(),
        "log": log,
        "flow_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "drawn": DRAWN,
        "bundled": BUNDLED,
        "pixels_sha256": {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, value in arrays.items()
            if name.endswith("pixels")
        },
        "starflow_options": dataclasses.asdict(starflow.config),
        "tarflow_options": dataclasses.asdict(tarflow.config),
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    safetensors.torch.save_file(arrays, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
