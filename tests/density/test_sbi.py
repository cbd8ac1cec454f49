"""sbi takes the estimator for posteriors and likelihoods, and finds what is known in closed form."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

from starflow.density.sbi import sbi_estimator
from starflow.errors import UserError
from tests.density.cases import check_fit

TINY: dict[str, Any] = {"channels": 16, "head_dim": 16, "num_blocks": 2, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbi writes its logs where it runs."""
    monkeypatch.chdir(tmp_path)


def test_another_target_is_an_error() -> None:
    with pytest.raises(UserError, match="the target is 'prior', expected 'posterior' for NPE"):
        sbi_estimator("prior")  # type: ignore[arg-type]


def estimator(target: Any, theta: Tensor, x: Tensor, **options: Any) -> Any:
    pytest.importorskip("sbi")
    return sbi_estimator(target, **{**TINY, **options})(theta, x)


@pytest.mark.parametrize("target", ["posterior", "likelihood"])
@pytest.mark.parametrize("x_shape", [(4,), (5, 2)])
def test_shapes_are_those_of_sbi(target: str, x_shape: tuple[int, ...]) -> None:
    theta, x = torch.randn(6, 3), torch.randn(6, *x_shape)
    event, context = (theta, x) if target == "posterior" else (x, theta)
    built = estimator(target, theta, x)
    assert (built.input_shape, built.condition_shape) == (event.shape[1:], context.shape[1:])
    assert built.loss(event, context).shape == (6,)
    torch.testing.assert_close(built.loss(event, context), -built.net(context).log_prob(event))
    assert built.log_prob(event[:, None], context[:1]).shape == (6, 1)
    assert built.log_prob(event.expand(2, *event.shape), context).shape == (2, 6)
    assert built.sample(torch.Size([7]), context).shape == (7, 6, *event.shape[1:])
    samples, nats = built.sample_and_log_prob(torch.Size([7]), context)
    torch.testing.assert_close(nats, built.log_prob(samples, context))


def test_it_is_standardised_and_can_be_copied_and_pickled() -> None:
    theta, x = 5 + torch.randn(50, 3), 100 * torch.randn(50, 2)
    built = estimator("posterior", theta, x)
    torch.testing.assert_close(built.net.shift, theta.mean(0))
    torch.testing.assert_close(built.net.context_scale, x.std(0, correction=0))
    file = io.BytesIO()
    torch.save(built, file)
    file.seek(0)
    for again in (copy.deepcopy(built), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again.log_prob(theta[None], x), built.log_prob(theta[None], x))


def linear_gaussian(count: int) -> tuple[MultivariateNormal, Tensor, Tensor]:
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((count,))
    return prior, theta, theta @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]) + 0.5 * torch.randn(count, 2)


def exact_posterior(x: Tensor) -> MultivariateNormal:
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    precision = torch.eye(2) + matrix @ matrix.T / 0.25
    return MultivariateNormal(torch.linalg.solve(precision, matrix @ x / 0.25), precision_matrix=precision)


TRAINING = {"training_batch_size": 100, "learning_rate": 3e-3, "max_num_epochs": 15}


def test_a_posterior_in_closed_form() -> None:
    inference = pytest.importorskip("sbi.inference")
    torch.manual_seed(0)
    prior, theta, x = linear_gaussian(2000)
    trainer = inference.NPE(prior, density_estimator=sbi_estimator("posterior", **TINY), show_progress_bars=False)
    trainer.append_simulations(theta, x).train(**TRAINING)
    observed = torch.tensor([0.8, -0.4])
    samples = trainer.build_posterior().sample((1000,), x=observed, show_progress_bars=False)
    expected = exact_posterior(observed)
    truth, learned = expected.sample((1000,)), float(prior.entropy() - expected.entropy())
    widest = float(torch.linalg.eigvalsh(expected.covariance_matrix)[-1].sqrt())
    posterior = trainer.build_posterior()
    check_fit(
        samples,
        lambda theta: posterior.log_prob(theta, x=observed, norm_posterior=False),
        truth,
        expected.log_prob(truth),
        widest,
        learned,
    )


def test_an_observation_may_be_a_sequence() -> None:
    inference = pytest.importorskip("sbi.inference")
    torch.manual_seed(0)
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    theta = prior.sample((1500,))
    x = theta[:, None] + 0.5 * torch.randn(1500, 4, 1)  # four noisy readings
    trainer = inference.NPE(prior, density_estimator=sbi_estimator("posterior", **TINY), show_progress_bars=False)
    trainer.append_simulations(theta, x).train(**TRAINING)
    readings = torch.tensor([[0.2], [1.0], [0.6], [1.0]])
    posterior = trainer.build_posterior()
    samples = posterior.sample((1000,), x=readings, show_progress_bars=False)
    expected = Independent(Normal(torch.tensor([0.7 * 16 / 17]), (1 / 17) ** 0.5), 1)
    truth, learned = expected.sample((1000,)), float(prior.entropy() - expected.entropy())
    nats = expected.log_prob(truth)
    check_fit(
        samples,
        lambda theta: posterior.log_prob(theta, x=readings, norm_posterior=False),
        truth,
        nats,
        (1 / 17) ** 0.5,
        learned,
    )


def test_a_likelihood_in_closed_form() -> None:
    inference = pytest.importorskip("sbi.inference")
    torch.manual_seed(0)
    prior, theta, x = linear_gaussian(2000)
    trainer = inference.NLE(prior, density_estimator=sbi_estimator("likelihood", **TINY), show_progress_bars=False)
    likelihood = trainer.append_simulations(theta, x).train(**TRAINING)
    _, fresh, seen = linear_gaussian(500)
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    exact = Independent(Normal(fresh @ matrix, 0.5), 1).log_prob(seen)
    learned = 0.5 * float(torch.logdet(torch.eye(2) + matrix.T @ matrix / 0.25))  # what theta says about x
    with torch.no_grad():
        nats = exact - likelihood.log_prob(seen[None], fresh)[0]
    assert -5 * float(nats.std()) / 500**0.5 < float(nats.mean()) < 0.1 * learned
    assert trainer.build_posterior().potential(fresh[:3], x=seen[:1]).shape == (3,)


def test_a_bounded_posterior_does_not_leak_out_of_its_prior() -> None:
    inference = pytest.importorskip("sbi.inference")
    torch.manual_seed(0)
    prior = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    theta = prior.sample((500,))
    x = theta + torch.randn(500, 2)  # so vague that an unbounded posterior puts much outside
    build = sbi_estimator("posterior", bounds=((0.0, 1.0), (0.0, 1.0)), **TINY)
    trainer = inference.NPE(prior, density_estimator=build, show_progress_bars=False)
    trainer.append_simulations(theta, x).train(**{**TRAINING, "max_num_epochs": 2})
    posterior = trainer.build_posterior()
    samples = posterior.posterior_estimator.sample(torch.Size([1000]), torch.tensor([[1.5, -0.5]]))
    assert bool(((samples >= 0) & (samples <= 1)).all())
    assert float(posterior.leakage_correction(torch.tensor([[1.5, -0.5]]), num_rejection_samples=1000)) == 1.0
