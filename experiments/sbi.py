"""The sbi experiment compares a Transformer flow with zuko's splines and masked flows, through sbi itself.

Every estimator is trained by sbi's own loop on the same simulations, with the same batch, rate and stopping rule.
Posteriors are estimated for two moons and SLCP, and the likelihood of a time series for the Gaussian process.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import plots
from experiments.results import SEEDS, Measurements, Result, Table, check_budget, mean_over_seeds, measure_once
from experiments.simulators import Simulator, simulators
from starflow.density.sbi import sbi_estimator
from starflow.errors import UserError

NAME = "sbi"
ESTIMATORS = ("SequenceFlow", "zuko NSF", "zuko MAF")
CLAIM = (
    "A stack of autoregressive Transformer blocks is a flexible density (TarFlow, arXiv 2412.06329), and causal "
    "attention is made for sequences; monotonic splines are made for single numbers (neural spline flows, arXiv "
    "1906.04032). Simulation-based inference has tasks of both kinds."
)
PRIOR_POINTS = 1024
"""Quasi-random draws of the prior that the posterior of an estimated likelihood is summed over."""

MEASURES = {
    "heldout_nats": "held-out log-likelihood, nats",
    "c2st": "C2ST (0.5 is perfect)",
    "calibration": "SBC, distance from uniform",
    "epochs": "epochs",
    "cpu_seconds": "training, CPU seconds",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    simulations: int = 2000
    batch: int = 100
    lr: float = 1e-3
    max_epochs: int = 40
    patience: int = 10
    channels: int = 32
    num_blocks: int = 4
    layers_per_block: int = 1
    heldout: int = 2000
    observations: int = 3
    samples: int = 400
    sbc_draws: int = 100
    sbc_samples: int = 50
    """Of each posterior that is estimated; an estimated likelihood is weighed at `PRIOR_POINTS` instead."""
    seeds: tuple[int, ...] = SEEDS


QUICK = Budget(
    simulations=100,
    batch=50,
    max_epochs=1,
    heldout=50,
    observations=1,
    samples=50,
    sbc_draws=30,
    sbc_samples=20,
    seeds=(0, 1),
)


def run(folder: Path, budget: Budget, log: Callable[[str], None], command: str) -> Result:
    """Compute the cells that are missing, draw the plot, and put the numbers into tables.

    Raises:
        UserError: sbi is not installed.
    """
    try:
        import sbi.inference  # noqa: F401
    except ImportError:
        raise UserError(
            "sbi is not installed, which this experiment compares with: pip install 'starflow[sbi]'"
        ) from None
    check_budget(folder, budget)
    found: dict[str, dict[str, list[Measurements]]] = {}
    for simulator in simulators():
        found[simulator.name] = {}
        for estimator in ESTIMATORS:
            found[simulator.name][estimator] = [
                measure_once(folder, name, partial(measure, simulator, estimator, seed, budget), log)
                for seed in budget.seeds
                for name in [f"{simulator.name}-{estimator}-{seed}".replace(" ", "-")]
            ]
    draw_plot(folder, found)
    return Result(
        name=NAME,
        title="Simulation-based inference: a Transformer flow beside splines",
        claim=CLAIM,
        tables=[table(name, cells) for name, cells in found.items()],
        command=command,
        values={"cells": found, "budget": vars(budget)},
    )


def measure(simulator: Simulator, estimator: str, seed: int, budget: Budget) -> Measurements:
    """Train one estimator by sbi and compare it with what is known."""
    from sbi.inference import NLE, NPE

    torch.manual_seed(seed)
    theta, x = simulator.draw(budget.simulations, torch.Generator().manual_seed(seed))
    likelihood = simulator.exact_log_prob is not None
    build = _builder(estimator, likelihood, budget)
    started = time.process_time()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as away, contextlib.chdir(away):  # sbi-logs go there
        trainer = (NLE if likelihood else NPE)(simulator.prior, density_estimator=build, show_progress_bars=False)
        warnings.simplefilter("ignore")  # that the budget ended before convergence; epochs are in the table
        trained = trainer.append_simulations(theta, x).train(
            training_batch_size=budget.batch,
            learning_rate=budget.lr,
            max_num_epochs=budget.max_epochs,
            stop_after_epochs=budget.patience,
        )
    seconds = time.process_time() - started
    trained.eval()
    if likelihood:
        found = _of_likelihood(simulator, trained, budget)
    else:
        found = _of_posterior(simulator, trainer, trained, budget)
    return {
        **found,
        "cpu_seconds": seconds,
        "epochs": trainer.summary["epochs_trained"][-1],
        "parameters": sum(one.numel() for one in trained.parameters() if one.requires_grad),
    }


def _builder(estimator: str, likelihood: bool, budget: Budget) -> Callable[[Tensor, Tensor], Any]:
    from sbi.neural_nets import likelihood_nn, posterior_nn

    if estimator == "SequenceFlow":
        return sbi_estimator(
            "likelihood" if likelihood else "posterior",
            channels=budget.channels,
            num_blocks=budget.num_blocks,
            layers_per_block=budget.layers_per_block,
        )
    network = likelihood_nn if likelihood else posterior_nn
    build: Callable[[Tensor, Tensor], Any] = network(estimator.lower().replace(" ", "_"))
    return build


@torch.no_grad()
def _of_posterior(simulator: Simulator, trainer: Any, trained: Any, budget: Budget) -> Measurements:
    from sbi.diagnostics import run_sbc
    from sbi.utils.metrics import c2st

    posterior = trainer.build_posterior()
    unseen = torch.Generator().manual_seed(1_000_000)
    theta, x = simulator.draw(budget.heldout, unseen)
    scores = []
    for one in x[: budget.observations]:
        exact = simulator.exact_samples(one, budget.samples, unseen)
        drawn = posterior.sample((budget.samples,), x=one, show_progress_bars=False)
        scores.append(float(c2st(exact, drawn)))
    some = slice(budget.sbc_draws)
    ranks, _ = run_sbc(
        theta[some], x[some], posterior, num_posterior_samples=budget.sbc_samples, show_progress_bar=False
    )
    return {
        "heldout_nats": float(trained.log_prob(theta[None], x).mean()),
        "c2st": sum(scores) / len(scores),
        "calibration": distance_from_uniform(ranks / budget.sbc_samples),
    }


@torch.no_grad()
def _of_likelihood(simulator: Simulator, trained: Any, budget: Budget) -> Measurements:
    from sbi.utils.metrics import c2st

    assert simulator.exact_log_prob is not None
    unseen = torch.Generator().manual_seed(1_000_000)
    theta, x = simulator.draw(budget.heldout, unseen)
    scores = []
    for one in theta[: budget.observations]:
        exact = simulator.exact_samples(one, budget.samples, unseen)
        drawn = trained.sample(torch.Size([budget.samples]), one[None])[:, 0]
        scores.append(float(c2st(exact, drawn)))
    nats = trained.log_prob(x[None], theta)[0]
    some = slice(budget.sbc_draws)
    shares = posterior_shares(simulator, lambda x, theta: trained.log_prob(x[None], theta)[0], theta[some], x[some])
    exact_shares = posterior_shares(simulator, simulator.exact_log_prob, theta[some], x[some])
    return {
        "heldout_nats": float(nats.mean()),
        "exact_nats": float(simulator.exact_log_prob(x, theta).mean()),
        "c2st": sum(scores) / len(scores),
        "calibration": distance_from_uniform(shares),
        "exact_calibration": distance_from_uniform(exact_shares),
    }


def posterior_shares(
    simulator: Simulator, log_prob: Callable[[Tensor, Tensor], Tensor], theta: Tensor, x: Tensor
) -> Tensor:
    """The posterior probability (R, K) that each parameter is below the one that made x, given a likelihood.

    These are the ranks of simulation-based calibration (Talts et al., arXiv 1804.06788) among infinitely many posterior
    samples: uniform if the likelihood is right. The prior is uniform, so that the posterior's weights at
    quasi-random points of its box are proportional to the likelihood there.

    Args:
        simulator: with a uniform prior.
        log_prob: of x (M, ...) given theta (M, K), nats (M,).
        theta: (R, K) draws of the prior.
        x: (R, ...) one simulation of each.
    """
    low, high = torch.tensor(simulator.low), torch.tensor(simulator.high)
    points = low + (high - low) * torch.quasirandom.SobolEngine(len(low), scramble=True, seed=0).draw(PRIOR_POINTS)
    shares = []
    for true, one in zip(theta, x, strict=True):
        weights = log_prob(one.expand(PRIOR_POINTS, *one.shape), points).double().softmax(0)
        shares.append(weights @ (points < true).double())
    return torch.stack(shares)


def distance_from_uniform(shares: Tensor) -> float:
    """Mean distance of the empirical distribution of shares (R, K) from the uniform one, over rows and columns.

    Of R uniform draws it is about 0.31 / sqrt(R).
    """
    ordered = shares.sort(0).values
    places = (torch.arange(len(shares)) + 0.5)[:, None] / len(shares)
    return float((ordered - places).abs().mean())


def table(name: str, cells: dict[str, list[Measurements]]) -> Table:
    """One simulator's measures, a row an estimator."""
    first = next(iter(cells.values()))[0]
    rows = [[estimator, *(_cell(found, key) for key in MEASURES)] for estimator, found in cells.items()]
    if "exact_nats" in first:
        exact = [f"{first['exact_nats']:.4g}", "0.5", f"{first['exact_calibration']:.4g}"]
        rows.append(["the process itself", *exact, *[""] * (len(MEASURES) - len(exact))])
    return [[name, *MEASURES.values()], *rows]


def _cell(found: list[Measurements], key: str) -> str:
    return str(found[0][key]) if key == "parameters" else str(mean_over_seeds(found, key))


def draw_plot(folder: Path, found: dict[str, dict[str, list[Measurements]]]) -> None:
    """C2ST of every estimator on every simulator, a dot a seed."""
    made, axes = plots.figure(1, len(found), 3.4)
    for axis, (name, cells) in zip(axes[0], found.items(), strict=True):
        for place, estimator in enumerate(ESTIMATORS):
            values = [one["c2st"] for one in cells[estimator]]
            axis.plot([place] * len(values), values, "o", alpha=0.6)
            axis.plot(place, sum(values) / len(values), "k_", markersize=18)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(title=name, ylim=(0.45, 1.02), xlim=(-0.5, len(ESTIMATORS) - 0.5))
        axis.set_xticks(range(len(ESTIMATORS)), [one.replace(" ", "\n") for one in ESTIMATORS])
    axes[0][0].set_ylabel("C2ST against exact samples")
    plots.save(made, folder / f"{NAME}.png")
