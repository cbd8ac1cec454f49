"""What the pages tell a reader to do works: commands and programs of the tutorials run, names and files exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from starflow.cli.main import COMMANDS, main
from starflow.config import from_dict
from starflow.train.recipe import Recipe
from tests.density.cases import check_fit
from tests.test_readme import empty, glyphs, run

__all__ = ["empty", "glyphs"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "reference" not in path.parts)
TEXTS = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("starflow ")]


def execute(page: str, without: str = "") -> dict[str, Any]:
    """Run the programs of a page, one after another; those that hold `without` are left out, where it is named."""
    names: dict[str, Any] = {}
    for program in blocks(page, "python"):
        if without and without in program:
            continue
        exec(compile(program, page, "exec"), names)
    return names


@pytest.mark.usefixtures("glyphs")
def test_start(empty: Path) -> None:
    for line in commands("start.md"):
        run(line)
    execute("start.md")
    assert (empty / "car.png").is_file()
    assert (empty / "apple.png").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("glyphs")
def test_draw(empty: Path) -> None:
    for line in commands("tutorials/draw.md"):
        run(line)
    names = execute("tutorials/draw.md")
    assert len(list((empty / "out" / "prompts").glob("*.png"))) == 49
    assert (empty / "again.png").is_file()
    assert len(names["drawn"].images) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("glyphs")
def test_likelihood(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = commands("tutorials/likelihood.md")
    for line in (first, *others):
        run(line)
    names = execute("tutorials/likelihood.md")
    assert names["best"] == "a red apple"
    assert len(list((empty / "maps").glob("*.png"))) == 2
    assert "nats" in capsys.readouterr().out


def log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    """log p(theta | x) (R,) of the page's simulator: normal around the sums, within the prior's box."""
    along = torch.linspace(-2, 2, 801, dtype=torch.float64)
    x = x.double()
    rest = x[:, 1:] - along  # the second parameter's mean, given the first
    share = (torch.special.ndtr((2 - rest) / 0.3) - torch.special.ndtr((-2 - rest) / 0.3)).double()
    mass = torch.distributions.Normal(along, 0.3).log_prob(x[:, :1]).exp() * share
    likelihood = torch.distributions.Normal(theta.double().cumsum(1), 0.3).log_prob(x).sum(1)
    nats: Tensor = likelihood - torch.trapezoid(mass, along, dim=1).log()
    return nats


@pytest.mark.slow
def test_posterior(empty: Path) -> None:
    """Beside the known posterior; see `check_fit`.

    The mean of a rank, a number between 0 and 1, is off by sqrt(k / 2) at most where the fit is off by k nats
    (Pinsker).
    """
    with_sbi = importlib.util.find_spec("sbi") is not None
    names = execute("tutorials/posterior.md", without="" if with_sbi else "from sbi.")
    covariance = torch.tensor([[0.09, -0.09], [-0.09, 0.18]])
    known = torch.distributions.MultivariateNormal(torch.tensor([0.4, 0.7]), covariance)
    truth = known.sample((4000,))
    truth = truth[(truth.abs() < 2).all(1)]  # the prior cuts off one in a thousand
    widest = float(torch.linalg.eigvalsh(covariance)[-1].sqrt())
    learned = math.log(16) - float(known.entropy())  # nats that the observation says about the parameters

    exact = log_posterior(truth, torch.tensor([[0.4, 1.1]]).expand_as(truth))
    check_fit(names["samples"], names["posterior"].log_prob, truth, exact, widest, learned)
    if with_sbi:
        through = names["trainer"].build_posterior()
        check_fit(
            names["through_sbi"],
            lambda theta: through.log_prob(theta, x=names["observed"]),
            truth,
            exact,
            widest,
            learned,
        )
    theta = torch.rand(4000, 2) * 4 - 2
    x = names["simulate"](theta)
    nats = float((log_posterior(theta, x) - names["flow"](x).log_prob(theta).detach()).mean())
    reach = math.sqrt(max(nats, 0.0) / 2) + 5 * 0.29 / math.sqrt(len(names["truth"]))
    assert (names["ranks"].mean(0) - 0.5).abs().max() < reach
    assert (names["ranks"].square().mean(0) - 1 / 3).abs().max() < reach + 1 / 50  # of 50 draws, so in steps of 1/50
    assert (empty / "posterior" / "model.safetensors").is_file()
    assert names["again"].config == names["flow"].config


@pytest.mark.slow
def test_time_series(empty: Path) -> None:
    last = "SequenceFlow.from_pretrained("
    names = execute("tutorials/time-series.md", without=last)
    for line in commands("tutorials/time-series.md"):
        run(line)
    (block,) = (program for program in blocks("tutorials/time-series.md", "python") if last in program)
    exec(compile(block, "tutorials/time-series.md", "exec"), names)
    assert -0.1 < names["trained_gap"] < 0.8
    assert (empty / "runs" / "density" / "samples" / "step_00000240.npy").is_file()
    assert -0.1 < names["gap"] < 0.8
    assert -0.1 < names["four_gap"] < 0.6
    assert names["density"]["flat"] > names["usual"] > names["density"]["noisy"]
    assert min(names["strangeness"].values()) > names["spread"]
    assert bool((names["drawn"][:, 4:] == 0).all())
    assert any(parameter.grad is not None for parameter in names["flow"].parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("glyphs")
def test_unlikely(empty: Path) -> None:
    names = execute("tutorials/unlikely.md")
    assert names["found"]["torn apple"] < names["found"]["apple"] - 100
    assert names["found"]["white"] > names["found"]["torn apple"]
    apple, torn, white = names["ratio"].tolist()
    assert white - apple > 10_000 > abs(torn - apple)  # the page says that the ratio sees one of the two alone
    assert names["inside"] / names["extra"].sum() > 0.3
    torch.testing.assert_close(-names["maps"].sum((1, 2)) * math.log(2), names["nats"], rtol=1e-4, atol=0.5)
    assert names["words"][int(names["order"][0, 0])] == "a red apple"
    assert (empty / "bits.png").is_file()


def test_the_recipe_of_the_tutorial_is_read() -> None:
    (text,) = blocks("tutorials/train.md", "yaml")
    assert from_dict(Recipe, yaml.safe_load(text)).data.source == "folder"


def test_the_commands_of_training_are_those_of_tested_pages() -> None:
    """tests/test_training_guide.py runs the fine-tuning, and tests/test_readme.py the tiny recipe."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in commands("tutorials/train.md"):
        known = line.startswith("starflow generate") or line in TEXTS["training.md"] or line in readme
        assert known, line


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {}


def help_of(name: str, known: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    if name not in known:
        capsys.readouterr()
        assert main([*name.split(), "--help"]) == 0
        known[name] = capsys.readouterr().out
    return known[name]


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_and_option_exists(page: str, helps: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted((command.name for command in COMMANDS), key=len, reverse=True)
    fenced = "\n".join(blocks(page, "sh"))
    indented = re.findall(r"^    (starflow .*)$", TEXTS[page], re.MULTILINE)
    named = re.findall(r"`(starflow [a-z][^`]*)`", TEXTS[page])
    keys = {f"--{field.name}" for field in dataclasses.fields(Recipe)}
    for line in [*re.findall(r"^starflow .*$", fenced, re.MULTILINE), *indented, *named]:
        rest = line.removeprefix("starflow ")
        name = next((name for name in names if re.match(rf"{name}(?![\w-])", rest)), None)
        assert name, line
        for option in re.findall(r"(?<!\S)(--[a-z][\w.-]*)", rest):
            assert "." in option or option in keys or option in help_of(name, helps, capsys), line


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "log.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    named = re.findall(r"(?<![\w/.])((?:tests|examples|recipes|benchmarks|docs|experiments)/[\w./-]*\w)", TEXTS[page])
    rooms = re.findall(r"`((?:flow|nn|sampling|published|train|latents|pipeline)/[\w/]+\.\w+)`", TEXTS[page])
    made = ("benchmarks/results/", "docs/reference/")
    absent = [name for name in named if not name.startswith(made) and not (ROOT / name).exists()]
    assert absent + [name for name in rooms if not (ROOT / "src" / "starflow" / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_linked_page_exists(page: str) -> None:
    """The built site's links are followed by test_site.py; this one is quick."""
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        target = (DOCS / page).parent / link
        assert link.startswith("http") or "reference/" in link or target.exists(), link


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = re.findall(
        r"^([\w/-]+)$", "\n".join(re.findall(r"```{toctree}\n(.*?)```", TEXTS["index.md"], re.DOTALL)), re.M
    )
    assert {page.removesuffix(".md") for page in TEXTS} - {"index"} <= set(listed)


def test_shell_lines_of_the_gpu_page_split() -> None:
    assert all(shlex.split(line) for block in blocks("gpu.md", "sh") for line in block.splitlines())
